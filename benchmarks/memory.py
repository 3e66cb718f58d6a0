"""What keys and values take in memory and in time: the cost of a request follows its own text.

    python benchmarks/memory.py

Small random models; prints ratios, and writes them to results/memory.json:

bytes       of the caches of fifteen short texts and a long one, over the sum of those of each alone;
            the same after the long one has left; a text of 32,000 tokens in the shape of an 8B model
            (counted, not allocated), over its own columns
step        of fifteen short texts beside a long one, over the sum of the steps of each kind: columns
            that attention reads, and time
kept        a forward with 3,000 finished texts in memory over one without, and a lookup among 10,000
            of them over one among 100
shared      bytes of 32 rows that begin with the same 1,000 tokens, over those of rows that copy them
layout      milliseconds of the host before the forward of 64 tiny requests
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cards_integrations.transformer.cache_layers import TreeLayer
from cards_integrations.transformer.flat_batch import FlatBatch, ForwardInput
from cards_integrations.transformer.forward import Transformer
from cards_integrations.transformer.kv_block import Layout, width_for
from cards_integrations.transformer.kv_cache import Branch, TreeCache
from cards_integrations.transformer.kv_memory import KVMemory

RESULTS = Path(__file__).parent / "results"
SHORT, LONG, SYSTEM = [50] * 15, 1900, 1000
VOCABULARY = 512


def model() -> Any:
    """A llama of 1.5 million random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=4096,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=count)


def opened(transformer: Transformer, texts: list[list[int]]) -> list[Branch]:
    """A row for each text, which is read; returns the branches at their tips."""
    branches = []
    for text in texts:
        tree = transformer.cache.open()
        transformer.memory.recall(tree, text)
        branch = tree.branch()
        transformer.logits([ForwardInput(branch, text[len(tree.ids) :])])
        tree.keep(branch)
        branches.append(branch)
    return branches


def fresh(lengths: list[int], memory: KVMemory | None = None) -> tuple[Transformer, list[Branch]]:
    transformer = Transformer(model(), memory)
    return transformer, opened(transformer, [tokens(n, seed) for seed, n in enumerate(lengths)])


def cache_bytes(lengths: list[int]) -> int:
    return fresh(lengths)[0].cache.bytes


def of_bytes() -> dict[str, float]:
    own, long = sum(cache_bytes([n]) for n in SHORT), cache_bytes([LONG])
    transformer, branches = fresh([*SHORT, LONG])
    both = transformer.cache.bytes
    transformer.cache.close(branches[-1].tree)
    layout = Layout()
    for call in range(32):  # layers of 8 heads of size 128
        layout.note(call, (torch.empty(0, 8, 128, dtype=torch.bfloat16),) * 2)
    shape = TreeCache([TreeLayer() for _ in range(32)], layout)
    idle, asked = shape.bytes, 32_000
    shape.open(asked)
    return {
        "bytes, 15 short and a long one, over the sum of their own": both / (own + long),
        "bytes after the long one has left, over the sum of their own": transformer.cache.bytes / own,
        "bytes of a row of 32,000 tokens, shape of an 8B model, over its own columns": (
            (shape.bytes - idle) / (asked * shape.bytes_per_token)
        ),
        "widths: columns of a row over those it needs, at most, from 256 on": max(
            width_for(n) / n for n in range(256, 40_000, 64)
        ),
    }


def cells(transformer: Transformer, branches: list[Branch]) -> int:
    """Columns that the attention of a step reads."""
    flat = FlatBatch([ForwardInput(branch, [7]) for branch in branches], transformer.cache)
    metadata = flat.metadata(transformer.patterns, transformer.reach, torch.float32, torch.device("cpu"))
    for branch in branches:
        branch.retract(1)
    return sum(group.tokens.numel() * group.width for group in metadata.groups)


def of_step() -> dict[str, float]:
    both, branches = fresh([*SHORT, LONG])
    short, short_branches = fresh(SHORT)
    long, long_branches = fresh([LONG])
    beside, alone, one = in_turns(
        lambda: step(both, branches), lambda: step(short, short_branches), lambda: step(long, long_branches)
    )
    own = cells(short, short_branches)
    return {
        "columns read by 15 short ones beside a long one, over without it": (
            (cells(both, branches) - cells(long, long_branches)) / own
        ),
        "time of a step of 15 short ones and a long one, over the sum of both": beside / (alone + one),
    }


def step(transformer: Transformer, branches: list[Branch]) -> None:
    transformer.logits([ForwardInput(branch, [7]) for branch in branches])
    for branch in branches:
        branch.retract(1)


def in_turns(*works: Callable[[], None], times: int = 30) -> list[float]:
    """The least CPU seconds of this thread of each, in turns, so that a noisy machine is noisy for all."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(times):
        for work, taken in zip(works, seconds, strict=True):
            began = time.thread_time()
            work()
            taken.append(time.thread_time() - began)
    return [min(taken) for taken in seconds]


def filled(memory: KVMemory, transformer: Transformer, texts: int) -> None:
    """Keep finished texts, of which no keys or values are made."""
    known = memory._texts(transformer.cache)
    for seed in range(texts):
        ids = tokens(100, 1000 + seed)
        path, start = known.match(ids)
        path = known.cut(path, start)
        known.insert(path, ids[start:], [])


def of_kept() -> dict[str, float]:
    plain, branches = fresh([50] * 4, KVMemory(2**40))
    memory = KVMemory(2**40)
    full, others = fresh([50] * 4, memory)
    filled(memory, full, 3000)
    without, beside = in_turns(lambda: step(plain, branches), lambda: step(full, others), times=100)
    few, many = KVMemory(2**40), KVMemory(2**40)
    small, large = Transformer(model(), few), Transformer(model(), many)
    filled(few, small, 100)
    filled(many, large, 10_000)
    prompt = [*tokens(100, 1000), *tokens(900, 5)]
    quick, slow = in_turns(
        lambda: [few._texts(small.cache).match(prompt) for _ in range(100)] and None,
        lambda: [many._texts(large.cache).match(prompt) for _ in range(100)] and None,
    )
    return {
        "a forward with 3,000 kept texts over none": beside / without,
        "a lookup among 10,000 kept texts over one among 100": slow / quick,
    }


def of_shared() -> dict[str, float]:
    texts = [[*tokens(SYSTEM, 1), *tokens(30, 10 + seed)] for seed in range(32)]
    found = []
    for reuse in (True, False):
        transformer = Transformer(model(), KVMemory(2**40, reuse))
        opened(transformer, texts)
        found.append(transformer.cache.bytes)
    return {"bytes of 32 rows with the same 1,000 first tokens, shared over copied": found[0] / found[1]}


def of_layout() -> dict[str, float]:
    transformer, branches = fresh([30] * 64)

    def layout() -> None:
        transformer._prepare(FlatBatch([ForwardInput(branch, [7]) for branch in branches], transformer.cache))
        for branch in branches:
            branch.retract(1)

    return {"milliseconds of layout for 64 requests": 1000 * in_turns(layout, times=200)[0]}


def main() -> None:
    torch.set_num_threads(1)
    found = {**of_bytes(), **of_step(), **of_kept(), **of_shared(), **of_layout()}
    for what, ratio in found.items():
        print(f"{ratio:8.3f}  {what}")
    (RESULTS / "memory.json").write_text(json.dumps({**found, "torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
