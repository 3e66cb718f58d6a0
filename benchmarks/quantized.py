"""SmolLM2 in its own 4 bits against the same in float32 or bf16: a step, a prompt, the weights' bytes, and seeds.

    python benchmarks/quantized.py [--against float32] [--threads 1] [--steps 30] [--seeds 16] [--tokens 32]

Both are loaded in one process, and take turns at every step, so that a noisy machine is noisy for both. A step is the
model's forward of one token for each of 1, 4 or 16 requests on short texts, layout and cache included. With --seeds,
so many CARDS requests are answered one by one and at once by the 4 bits, and those with equal texts are counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from paired_speed import QUESTIONS

from cards_integrations import CardsLLM
from cards_integrations.engine import EngineSettings
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Transformer
from cards_integrations.transformer.kv_cache import Branch

DType: TypeAlias = Literal["float32", "bfloat16"]
REQUESTS = (1, 4, 16)
PROMPT = 40


class Side:
    """The model in one of the two forms."""

    def __init__(self, dtype: Any, threads: int) -> None:
        model, _ = ModelLoader(Placement(device="cpu", dtype=dtype, threads=threads)).causal(LocalModel())
        self.transformer = Transformer(model)
        tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
        self.megabytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()) / 1e6
        self.texts: list[Branch] = []

    def begin(self, requests: int) -> float:
        """Read so many prompts; returns the seconds."""
        for branch in self.texts:
            self.transformer.cache.close(branch.tree)
        self.texts = [self.transformer.cache.open().branch() for _ in range(requests)]
        return self.timed([[(7 * i + j) % 40_000 + 50 for j in range(PROMPT)] for i in range(requests)])

    def timed(self, ids: Sequence[Sequence[int]]) -> float:
        """Seconds of a forward with these tokens."""
        began = time.perf_counter()
        self.transformer.logits([ForwardInput(*each) for each in zip(self.texts, map(list, ids), strict=True)])
        return time.perf_counter() - began


def measured(against: DType, threads: int, steps: int) -> dict[str, list[float]]:
    """Return the ratios, 4 bits over the other, of all pairs of steps; and of prompts and bytes."""
    packed, dense = Side("auto", threads), Side(against, threads)
    ratios = {"resident weights": [packed.megabytes / dense.megabytes]}
    print(f"resident weights: {packed.megabytes:.0f} MB, {against} {dense.megabytes:.0f} MB")
    for n in REQUESTS:
        packed.begin(n), dense.begin(n)
        pairs = [_pair(packed, dense, [[100 + step + i] for i in range(n)], step) for step in range(steps)]
        ratios[f"a step, {n} requests"] = [own / other for own, other in pairs]
        own, other = (1e3 * min(side) for side in zip(*pairs, strict=True))
        print(f"a step, {n:2} requests: {own:6.1f} ms, {against} {other:6.1f} ms at least", flush=True)
    begun = [(packed.begin(4), dense.begin(4)) for _ in range(5)]
    ratios[f"a prompt, 4 x {PROMPT} tokens"] = [own / other for own, other in begun]
    return ratios


def _pair(packed: Side, dense: Side, ids: list[list[int]], step: int) -> tuple[float, float]:
    """Seconds of a step on both, who begins in turns."""
    if step % 2:
        own = packed.timed(ids)
        return own, dense.timed(ids)
    other = dense.timed(ids)
    return packed.timed(ids), other


def equal_texts(seeds: int, tokens: int, threads: int) -> int:
    """Return how many seeds give the same text alone and at once with the others."""
    prompts = [QUESTIONS[i % len(QUESTIONS)] for i in range(seeds)]
    with CardsLLM(max_tokens=tokens, engine=EngineSettings(device="cpu", threads=threads)) as llm:
        together = llm.align_batch(prompts, seeds=range(seeds))
        alone = [llm.align(prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    return sum(a.text == b.text for a, b in zip(alone, together, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    for what, ratios in measured(options.against, options.threads, options.steps).items():
        print(f"{what:<28}{statistics.median(ratios):7.3f}  [{min(ratios):.3f}, {max(ratios):.3f}]")
    if options.seeds:
        equal = equal_texts(options.seeds, options.tokens, options.threads)
        print(f"seeds with the same text alone and at once: {equal} of {options.seeds}")


if __name__ == "__main__":
    main()
