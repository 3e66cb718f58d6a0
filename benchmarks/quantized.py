"""SmolLM2 in its quantized forms against dense weights: a step, a prompt, the weights' bytes, and seeds.

    python benchmarks/quantized.py [--forms float16 int4 int8 unfused] [--against float32] [--threads 1] [--steps 30]
        [--seeds 16] [--tokens 32] [--results benchmarks/results/quantized.json]

All are loaded in one process, and take turns at every step, so that a noisy machine is noisy for all; with one thread
the time is what that thread spent on the CPU. A step is the model's forward of one token for each of 1, 4 or 16
requests on short texts, layout and cache included. "unfused" is float16 with the layers and norms of transformers. With
--seeds, so many requests are answered one by one and at once in the default form, and those with equal texts counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from paired_speed import QUESTIONS

from cards_integrations import CardsLLM
from cards_integrations.engine import EngineSettings
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Transformer
from cards_integrations.transformer.kv_cache import Branch
from cards_integrations.transformer.quantization import Float16Linear

FORMS = ("float16", "int4", "int8", "unfused")
REQUESTS = (1, 4, 16)
PROMPT = 40
Ratios = dict[str, dict[str, list[float]]]
"""Of each kind of work and form, to the dense weights."""


class Side:
    """The model in one form."""

    def __init__(self, model: Any, threads: int) -> None:
        self.transformer = Transformer(model)
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
        packed = [layer.weight for layer in model.modules() if isinstance(layer, Float16Linear)]
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        self.megabytes = (held + sum(2 * weight.numel() for weight in packed)) / 1e6
        self.texts: list[Branch] = []

    def begin(self, requests: int) -> float:
        """Read so many prompts; returns the seconds."""
        for branch in self.texts:
            self.transformer.cache.close(branch.tree)
        self.texts = [self.transformer.cache.open().branch() for _ in range(requests)]
        return self.timed([[(7 * i + j) % 40_000 + 50 for j in range(PROMPT)] for i in range(requests)])

    def timed(self, ids: Sequence[Sequence[int]]) -> float:
        """Seconds of a forward with these tokens."""
        began = self.clock()
        self.transformer.logits([ForwardInput(*each) for each in zip(self.texts, map(list, ids), strict=True)])
        return self.clock() - began


def loaded(form: str, threads: int) -> Side:
    """The model in a form of `FORMS`, or dense in a dtype."""
    quantized = {"unfused": "float16"}.get(form, form) if form in FORMS else None
    spec = LocalModel.model_validate({"quantization": quantized})
    placement = Placement.model_validate({"device": "cpu", "dtype": "auto" if quantized else form, "threads": threads})
    as_it_is = mock.patch("cards_integrations.models.local.quantize.fuse")
    with as_it_is if form == "unfused" else contextlib.nullcontext():
        model, _ = ModelLoader(placement).causal(spec)
    return Side(model, threads)


def measured(forms: Sequence[str], against: str, threads: int, steps: int) -> Ratios:
    """Return the ratios of all rounds, for steps, prompts and bytes."""
    sides = {form: loaded(form, threads) for form in (against, *forms)}
    bytes_of = {form: side.megabytes for form, side in sides.items()}
    print("resident weights, MB:", {form: round(megabytes) for form, megabytes in bytes_of.items()}, flush=True)
    ratios = {"resident weights": _ratios([bytes_of], against)}
    for n in REQUESTS:
        for side in sides.values():
            side.begin(n)
        rounds = [_in_turns(sides, [[100 + step + i] for i in range(n)], step) for step in range(steps)]
        ratios[f"a step, {n} requests"] = _ratios(rounds, against)
        least = {form: round(1e3 * min(each[form] for each in rounds), 1) for form in sides}
        print(f"a step, {n} requests, ms at least:", least, flush=True)
    begun = [{form: side.begin(4) for form, side in sides.items()} for _ in range(5)]
    ratios[f"a prompt, 4 x {PROMPT} tokens"] = _ratios(begun, against)
    return ratios


def _in_turns(sides: dict[str, Side], ids: list[list[int]], step: int) -> dict[str, float]:
    """Seconds of a step in each form; who begins changes."""
    order = sorted(sides, reverse=step % 2 == 1)
    return {form: sides[form].timed(ids) for form in order}


def _ratios(rounds: Sequence[dict[str, float]], against: str) -> dict[str, list[float]]:
    return {form: [each[form] / each[against] for each in rounds] for form in rounds[0] if form != against}


def equal_texts(seeds: int, tokens: int, threads: int) -> int:
    """Return how many seeds give the same text alone and at once with the others."""
    prompts = [QUESTIONS[i % len(QUESTIONS)] for i in range(seeds)]
    with CardsLLM(max_tokens=tokens, engine=EngineSettings(device="cpu", threads=threads)) as llm:
        together = llm.align_batch(prompts, seeds=range(seeds))
        alone = [llm.align(prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    return sum(a.text == b.text for a, b in zip(alone, together, strict=True))


def summary(ratios: Ratios) -> dict[str, dict[str, list[float]]]:
    """Median, least and greatest of the ratios of each kind of work and form."""
    return {
        what: {form: [round(f(found), 3) for f in (statistics.median, min, max)] for form, found in each.items()}
        for what, each in ratios.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--against", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "cpu": torch.backends.cpu.get_cpu_capability(), "threads": options.threads, "against": options.against,
        "[median, least, greatest ratio]": summary(
            measured(options.forms, options.against, options.threads, options.steps)
        ),
    }  # fmt: skip
    if options.seeds:
        equal = equal_texts(options.seeds, options.tokens, options.threads)
        found["seeds with the same text alone and at once"] = f"{equal} of {options.seeds}"
    print(json.dumps(found, indent=2))
    if options.results:
        options.results.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
