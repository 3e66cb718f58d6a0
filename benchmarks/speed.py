"""What an aligned answer costs in time: our engine against what people run today, all in one process.

    python benchmarks/speed.py [--batch 1 16] [--repeats 3] [--parts plain methods ...] [--add]

The embedded model and its sentiment reward, one set of prompts, the same budget for all. Ours runs as users get it, in
4 or 16 bits where this CPU has the kernels; theirs in bf16 if the CPU is fast at it, else in float32:

plain       our plain sampling and `generate` of transformers
methods     the default, CARDS and best-of-16, ours and theirs (the transcription in naive.py, `generate` + a
            batched reward), side by side
long        512 tokens: CARDS and the transcription (some minutes)
concurrent  8 and 16 CARDS requests at once and one after another
profile     where a CARDS second goes, and what the reward model reads
turns       time to the first segment of a second turn on a 1,500-token history
frontier    best-of-N and CARDS at equal reward on a tiny pair (frontier.py)
quantized   a step of SmolLM2 in its own 4 bits against float32, and the bytes of its weights (quantized.py)

Contenders take turns, so that a noisy machine is noisy for all; medians and ranges of the repeats.
Writes results/speed.json and results/speed.png. Ratios, not seconds, travel between machines.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from naive import Plain
from quality import PROMPTS
from rich.console import Console
from rich.table import Table

from cards_integrations import CardsLLM
from cards_integrations.decoding import BestOfN, Cards, Cascade, Decoding, Sampling
from cards_integrations.engine.worker import Worker
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import NAMED
from cards_integrations.trace import Alignment

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
REWARD = NAMED["sentiment"].parts[0]  # without its guard, which others than the engine do not have
SAMPLER = Sampler()
STORY = "Write a long story about a lighthouse keeper and her dog."


class Bench:
    """The contenders and what was measured: a list of runs for each (part, contender)."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.llm = CardsLLM(reward=REWARD, decoding="cards", max_tokens=64, engine={"prefix_reuse": False})
        self.plain = self.alone(lambda: Plain.load(LocalModel(), REWARD))
        self.runs: dict[str, dict[str, list[dict[str, float]]]] = {}
        self.ratios: dict[str, dict[str, Any]] = {}

    @property
    def worker(self) -> Worker:
        engine = self.llm._engine({})
        engine.loaded()
        assert engine._worker is not None  # it times what happens inside
        return engine._worker

    def alone(self, work: Callable[[], T]) -> T:
        """Run in the engine's thread.

        A process in which two threads have run torch has two pools of threads; with more threads
        than cores OpenMP lets them sleep between any two operations, which slows small ones by half.
        """

        async def run() -> T:
            return work()

        return self.worker.submit(run()).result()

    def ours(self, prompts: list[str], decoding: Decoding, tokens: int, seed: int) -> dict[str, float]:
        began = time.perf_counter()
        seeds = range(seed * 1000, seed * 1000 + len(prompts))
        answers = self.llm.align_batch(prompts, seeds=seeds, decoding=decoding, max_tokens=tokens)
        return counted(answers, time.perf_counter() - began)

    def theirs(self, write: Callable[[], list[list[int]]]) -> dict[str, float]:
        self.plain.counts = dict.fromkeys(self.plain.counts, 0)
        began = time.perf_counter()
        answers = self.alone(write)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": sum(map(len, answers)), **self.plain.counts}

    def take_turns(self, part: str, contenders: dict[str, Callable[[int], dict[str, float]]], repeats: int) -> None:
        runs = self.runs.setdefault(part, {name: [] for name in contenders})
        for repeat in range(repeats + 1):
            for name, run in contenders.items():
                if repeat == 0 and name.startswith("ours"):
                    run(0)  # warm-up: the scheduler's profile, the caches
                elif repeat > 0:
                    runs[name].append(run(repeat))
                    print(f"{part:<28}{name:<36}{runs[name][-1]['seconds']:8.2f} s", flush=True)

    def seconds(self, part: str, name: str, per: str | None = None) -> list[float]:
        return [run["seconds"] / (run[per] if per else 1) for run in self.runs[part][name]]

    def ratio(
        self, what: str, slow: list[float], fast: list[float], wanted: float | None, at_most: bool = False
    ) -> None:
        pairs = [a / b for a, b in zip(slow, fast, strict=True)]
        self.ratios[what] = {
            "ratio": statistics.median(pairs), "range": [min(pairs), max(pairs)], "wanted": wanted, "at most": at_most,
        }  # fmt: skip

    # --- the parts ---

    def do_plain(self) -> None:
        wanted = {1: 1.0, 16: 1.4}
        for batch in self.options.batch:
            self._plain(f"plain, batch {batch}", PROMPTS[:batch], wanted.get(batch))
        passages = [" ".join([*PROMPTS[i:], *PROMPTS[:i]] * 5) for i in range(16)]
        long = [self.plain.chat.tokenizer.decode(self.plain.chat.encode(text)[:960]) for text in passages]
        self._plain("plain, batch 16, 1,000-token prompt", long, 2.0)

    def _plain(self, part: str, prompts: list[str], wanted: float | None) -> None:
        """Decoding alone: the time for 64 tokens less the time for 1, which reads the prompt."""

        def decoding(write: Callable[[int], dict[str, float]]) -> dict[str, float]:
            first, all_ = write(1), write(64)
            return {
                **all_, "seconds": all_["seconds"] - first["seconds"], "tokens": all_["tokens"] - first["tokens"],
                "seconds with prompt": all_["seconds"],
            }  # fmt: skip

        def generate(tokens: int, seed: int) -> list[list[int]]:
            return [found for [found] in self.plain.generate(prompts, SAMPLER, tokens, 1, seed)]

        self.take_turns(
            part,
            {
                "transformers generate": lambda s: decoding(lambda n: self.theirs(lambda: generate(n, s))),
                "ours, plain": lambda s: decoding(lambda n: self.ours(prompts, Sampling(), n, s)),
            },
            self.options.repeats,
        )
        theirs, ours = (self.seconds(part, name, "tokens") for name in ("transformers generate", "ours, plain"))
        self.ratio(f"{part}: generate / ours, seconds a token", theirs, ours, wanted)

    def do_methods(self) -> None:
        for batch in self.options.batch:
            alone = batch == 1
            tokens = 128 if alone else 64
            part = f"aligned, batch {batch}, {tokens} tokens"

            def prompts(repeat: int, batch: int = batch) -> list[str]:
                """Alone, another prompt each time: their acceptance rates are far apart."""
                return [PROMPTS[repeat]] if batch == 1 else PROMPTS[:batch]

            contenders: dict[str, Callable[[int], dict[str, float]]] = {
                "ours, plain": lambda s, p=prompts, n=tokens: self.ours(p(s), Sampling(), n, s),
                "ours, Cascade": lambda s, p=prompts, n=tokens: self.ours(p(s), Cascade(), n, s),
                "ours, CARDS": lambda s, p=prompts, n=tokens: self.ours(p(s), Cards(), n, s),
                "ours, best-of-16": lambda s, p=prompts, n=tokens: self.ours(p(s), BestOfN(n=16), n, s),
                "generate, best-of-16": lambda s, p=prompts, n=tokens: self.theirs(
                    lambda: self.plain.best_of_n(p(s), SAMPLER, n, 16, s)
                ),
            }
            if alone:
                contenders["transcription, CARDS"] = lambda s, p=prompts, n=tokens: self._naive(p(s)[0], n, s)
            self.take_turns(part, contenders, 2 * self.options.repeats if alone else max(1, self.options.repeats - 1))
            if batch == 1:
                naive, ours = (self.seconds(part, name, "tokens") for name in ("transcription, CARDS", "ours, CARDS"))
                self.ratio("transcription / ours, CARDS, 128 tokens", naive, ours, 5.0)
            plain = self.seconds(part, "ours, plain", "tokens")
            for method in ("Cascade", "CARDS"):
                guided = self.seconds(part, f"ours, {method}", "tokens")
                self.ratio(f"ours, {method} / plain, batch {batch}", guided, plain, None)
            theirs, ours = (self.seconds(part, f"{who}, best-of-16") for who in ("generate", "ours"))
            self.ratio(f"best-of-16, batch {batch}: generate / ours", theirs, ours, None)

    def _naive(self, prompt: str, tokens: int, seed: int) -> dict[str, float]:
        assert REWARD.scale is not None
        scale = REWARD.scale
        return self.theirs(lambda: [self.plain.cards(prompt, Cards(), scale, SAMPLER, tokens, seed * 1000)])

    def do_long(self) -> None:
        self.take_turns(
            "aligned, batch 1, 512 tokens",
            {
                "ours, CARDS": lambda s: self.ours([STORY], Cards(), 512, s),
                "transcription, CARDS": lambda s: self._naive(STORY, 512, s),
            },
            1,
        )
        naive, ours = (
            self.seconds("aligned, batch 1, 512 tokens", name, "tokens")
            for name in ("transcription, CARDS", "ours, CARDS")
        )
        self.ratio("transcription / ours, CARDS, 512 tokens", naive, ours, 12.0)

    def do_concurrent(self) -> None:
        for requests in (8, 16):
            self._concurrent(PROMPTS[:requests], f"{requests} CARDS requests")

    def _concurrent(self, prompts: list[str], what: str) -> None:
        part = f"{what}, 64 tokens"

        def one_after_another(seed: int) -> dict[str, float]:
            began = time.perf_counter()
            answers = [self.llm.align(p, seed=seed * 1000 + i, max_tokens=64) for i, p in enumerate(prompts)]
            return counted(answers, time.perf_counter() - began)

        self.take_turns(
            part,
            {"one after another": one_after_another, "at once": lambda s: self.ours(prompts, Cards(), 64, s)},
            max(1, self.options.repeats - 1),
        )
        apart, together = self.seconds(part, "one after another", "tokens"), self.seconds(part, "at once", "tokens")
        self.ratio(f"{what}: one after another / at once", apart, together, 4.0)

    def do_profile(self) -> None:
        self.llm.align(PROMPTS[0], max_tokens=4)
        for batch in self.options.batch:
            profile = Profile(self.worker)
            answers = profile.of(lambda b=batch: self.llm.align_batch(PROMPTS[:b], seeds=range(b), decoding=Cards()))
            self.runs[f"profile, CARDS, batch {batch}"] = {
                "all": [{**profile.shares(), **counted(answers, profile.seconds)}]
            }
            share = [profile.outside / profile.seconds]
            self.ratio(f"time outside model forwards, batch {batch}", share, [1.0], 0.1, at_most=True)
            read = [profile.rm_tokens / profile.new_tokens]
            self.ratio(f"RM tokens read / new tokens, batch {batch}", read, [1.0], 1.2, at_most=True)

    def do_turns(self) -> None:
        history = [{"role": "user", "content": " ".join([*PROMPTS, *PROMPTS[::-1]] * 3)[:6600]}]
        self.llm.close()  # its thread, see `alone`; the next use starts it again
        with CardsLLM(decoding="cards", max_tokens=32, engine={"max_rows": 8}) as llm:
            llm.align("Hello", max_tokens=4)

            def turn(messages: list[dict[str, str]], seed: int) -> tuple[dict[str, float], str]:
                began, first, text = time.perf_counter(), 0.0, ""
                for item in llm._engine({}).stream(llm.request(messages, {"seed": seed})):
                    if isinstance(item, Alignment):
                        text, usage = item.text, item.usage
                        break
                    first = first or time.perf_counter() - began
                return {"seconds": first, "tokens": usage.prompt_tokens, "cached": usage.cached_tokens}, text

            runs: dict[str, list[dict[str, float]]] = {"cold": [], "second turn": []}
            for seed in range(self.options.repeats):
                begin = [{"role": "user", "content": f"{seed}. {history[0]['content']}"}]
                cold, text = turn(begin, seed)
                more = [{"role": "assistant", "content": text}, {"role": "user", "content": "And how do you feel now?"}]
                again, _ = turn([*begin, *more], seed)
                runs["cold"].append(cold)
                runs["second turn"].append(again)
            self.runs["turns"] = runs
        self.ratio(
            "time to first segment, second turn / cold",
            self.seconds("turns", "second turn"), self.seconds("turns", "cold"), 0.2, at_most=True,
        )  # fmt: skip

    def do_frontier(self) -> None:
        from frontier import measured

        self.llm.close()
        found = measured(Path(__file__).parents[2] / "shared" / "models", prompts=64, concurrent=16)
        if found is None:
            print("frontier: the tiny pair is not here, skipped")
            return
        self.runs["frontier"] = found["runs"]
        for n, wanted in ((16, 2.5), (32, 3.5)):
            for judged_by, ratio in found["ratios"][n].items():
                what = f"best-of-{n} / CARDS at equal {judged_by}, tiny pair"
                self.ratio(what, [ratio], [1.0], wanted if judged_by == "reward" else None)

    def do_quantized(self) -> None:
        from quantized import measured

        self.llm.close()
        wanted = {
            "resident weights": 0.225,  # of bf16 0.45
            "a step, 1 requests": 0.3,
            "a step, 4 requests": 0.45,
            "a step, 16 requests": 0.75,
        }
        for what, ratios in measured(["int4"], "float32", torch.get_num_threads(), steps=30).items():
            name, own = f"SmolLM2, 4 bits / float32, {what}", ratios["int4"]
            self.ratio(name, own, [1.0] * len(own), wanted.get(what), at_most=True)

    def report(self) -> None:
        table = Table(title=f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
        for column in ("what", "ratio", "range", "wanted"):
            table.add_column(column, justify="left" if column == "what" else "right")
        for what, found in self.ratios.items():
            wanted, low, high = found["wanted"], *found["range"]
            met = "" if wanted is None else ("≤ " if found["at most"] else "≥ ") + f"{wanted:g}"
            table.add_row(what, f"{found['ratio']:.2f}", f"{low:.2f} to {high:.2f}", met)
        Console(width=140).print(table)
        file = RESULTS / "speed.json"
        before = json.loads(file.read_text()) if self.options.add and file.exists() else {"ratios": {}, "runs": {}}
        results = {key: {**before[key], **getattr(self, key)} for key in ("ratios", "runs")}
        file.write_text(json.dumps({**results, "torch": torch.__version__}, indent=1) + "\n")
        from chart import draw

        draw(results, RESULTS / "speed.png")


class Profile:
    """Where the time of a run goes: in the models' forwards, or in what is ours."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.lm = self.rm = self.seconds = 0.0
        self.rm_tokens = self.new_tokens = 0

    def of(self, run: Callable[[], list[Alignment]]) -> list[Alignment]:
        judge: Any = next(iter(self.worker.rewards.built.values()))
        lm, rm = self.worker.language_model.model, judge.transformer.model.base_model
        lm_forward, rm_forward, feed = lm.forward, rm.forward, judge._forward_input

        def timed(forward: Callable[..., Any], attribute: str) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                began = time.perf_counter()
                out = forward(*args, **kwargs)
                setattr(self, attribute, getattr(self, attribute) + time.perf_counter() - began)
                return out

            return run

        def counted_feed(response: Any, *text: Any) -> Any:
            read = judge.rows[response.conversation]
            kept = len(read.tree.ids)
            made = feed(response, *text)
            if kept:  # else it reads the prompt
                self.rm_tokens += len(made.ids)
                self.new_tokens += len(read.before_ids) + len(response.ids or []) - kept or 1
            return made

        lm.forward, rm.forward, judge._forward_input = timed(lm_forward, "lm"), timed(rm_forward, "rm"), counted_feed
        began = time.perf_counter()
        try:
            return run()
        finally:
            self.seconds = time.perf_counter() - began
            lm.forward, rm.forward, judge._forward_input = lm_forward, rm_forward, feed

    @property
    def outside(self) -> float:
        return self.seconds - self.lm - self.rm

    def shares(self) -> dict[str, float]:
        return {"language model": self.lm, "reward model": self.rm, "all else": self.outside}


def counted(answers: list[Alignment], seconds: float) -> dict[str, float]:
    usages = [answer.usage for answer in answers]
    return {
        "seconds": seconds,
        "tokens": sum(u.completion_tokens for u in usages),
        "drafted": sum(u.drafted_tokens for u in usages),
        "candidates": sum(u.drafts for u in usages),
        "LM tokens": sum(u.lm_tokens for u in usages),
        "RM tokens": sum(u.rm_tokens for u in usages),
        "LM forwards, most of one": max(u.lm_forwards for u in usages),
        "RM forwards, most of one": max(u.rm_forwards for u in usages),
        "reward": statistics.mean(a.reward for a in answers if a.reward is not None) if answers[0].reward else 0.0,
    }


PARTS = ("profile", "turns", "concurrent", "plain", "methods", "frontier", "quantized", "long")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--add", action="store_true", help="keep the results of other parts in speed.json")
    bench = Bench(parser.parse_args())
    for part in PARTS:
        if part in bench.options.parts:
            getattr(bench, f"do_{part}")()
            bench.report()
    bench.llm.close()


if __name__ == "__main__":
    main()
