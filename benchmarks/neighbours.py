"""What requests and other processes do to each other: company, a busy core, and a long life.

    python benchmarks/neighbours.py [--parts together busy many] [--repeats 3]

together    eight CARDS requests one after another, over the same eight at once: wall time (embedded model)
busy        a plain step of the embedded model while another process keeps one core busy, over idle, with the
            default settings: `threads="auto"` finds out
many        memory, threads, tasks and open files after 1,000 requests with a reward function and a schema of
            their own each, over those after 200 (tiny random model; without finished texts, which `kv_memory` bounds)

Prints ratios, and writes them to results/neighbours.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from paired_speed import QUESTIONS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from cards_integrations import CardsLLM
from cards_integrations.decoding import Cards, FixedLength, Sampling
from cards_integrations.engine import EngineSettings
from cards_integrations.rewards import FunctionReward

RESULTS = Path(__file__).parent / "results" / "neighbours.json"
TOKENS = 48
SPIN = "while True: pass"


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- eight requests ---


def together(repeats: int) -> dict[str, float]:
    with CardsLLM(decoding="cards", max_tokens=TOKENS, engine={"prefix_reuse": False}) as llm:
        prompts, seeds = QUESTIONS[:8], list(range(8))
        llm.align_batch(prompts[:2], seeds=seeds[:2])  # loaded, timed, and its scale is known
        ratios = []
        for _ in range(repeats):
            at_once = seconds(lambda: llm.align_batch(prompts, seeds=seeds))
            one_by_one = seconds(lambda: [llm.align(p, seed=s) for p, s in zip(prompts, seeds, strict=True)])
            ratios.append(one_by_one / at_once)
    return {"one after another over at once": statistics.median(ratios)}


# --- a busy core ---


@contextmanager
def busy_core() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def busy(repeats: int) -> dict[str, float]:
    with CardsLLM(max_tokens=TOKENS, decoding=Sampling(), engine={"prefix_reuse": False}) as llm:
        answer = lambda: llm.align(QUESTIONS[0], seed=1)  # noqa: E731
        answer()
        ratios = []
        for _ in range(repeats):
            idle = seconds(answer)
            with busy_core():
                answer()  # it notices
                ratios.append(seconds(answer) / idle)
            answer()
    return {"a step beside a busy core over idle": statistics.median(ratios)}


# --- a thousand rewards and schemas ---


def tiny_model(folder: str) -> str:
    """A llama of random weights whose vocabulary is bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=257, eos_token_id=256, pad_token_id=256, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def held(llm: CardsLLM) -> dict[str, int]:
    """What the process holds now."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files = len(list(Path("/proc/self/fd").iterdir()))
    state = llm.inspect()
    return {"MiB": resident >> 20, "threads": threading.active_count(), "files": files, "tasks": state.tasks}


def one_of_many(llm: CardsLLM, number: int) -> None:
    def reward(prompt: str, responses: list[str]) -> list[float]:
        return [float(len(response) + number) for response in responses]

    schema = {"type": "object", "properties": {f"n{number}": {"type": "boolean"}}, "required": [f"n{number}"]}
    decoding = Cards(target_reward=float(number), beta=1.0, boundary=FixedLength(length=4))
    llm.align("Hi", reward=FunctionReward(function=reward), decoding=decoding, response_format=schema, seed=number)


def many(repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = EngineSettings(device="cpu", dtype="float32", threads=1, width=2, prefix_reuse=False)
        with CardsLLM(model=tiny_model(folder), decoding="cards", max_tokens=24, engine=settings) as llm:
            after = {}
            for number in range(1000):
                one_of_many(llm, number)
                if number + 1 in (200, 1000):
                    after[number + 1] = held(llm)
    return {"after 200": after[200], "after 1,000": after[1000], "MiB more": after[1000]["MiB"] - after[200]["MiB"]}


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {"together": together, "busy": busy, "many": many}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in options.parts:
        known[part] = PARTS[part](options.repeats)
        print(part, known[part], flush=True)
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
