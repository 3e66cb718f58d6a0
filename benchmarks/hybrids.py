"""A step of sixteen candidates on models with recurrent layers, over a plain batched forward of the same rows.

    python benchmarks/hybrids.py [--repeats 40]

Random weights in shapes between a test's and a product's (hidden size 512, eight layers), in turns in one run: ours
with the layout, the states that are read and written back, and the trees of attention; transformers' own with a cache
that stays a batch. Prints ratios, and writes them to results/hybrids.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from cards_integrations.transformer.cache_layers import cache_argument
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Transformer

RESULTS = Path(__file__).parent / "results" / "hybrids.json"
ROWS, PROMPT = 16, 64
SIZES = {
    "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**LINEAR, "head_dim": 64, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2},
    "falcon_h1": {"mamba_d_ssm": 1024, "mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 64, "head_dim": 64},
    "granitemoehybrid": {
        "layer_types": (["mamba"] * 3 + ["attention"]) * 2, "mamba_n_heads": 16, "mamba_d_head": 64,
        "mamba_d_state": 64, "num_local_experts": 0, "shared_intermediate_size": 1024,
    },
    "lfm2": {"layer_types": (["conv"] * 3 + ["full_attention"]) * 2, "block_auto_adjust_ff_dim": False},
}  # fmt: skip


def made(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    return AutoModelForCausalLM.from_config(config).float().eval()


class Plain:
    """Rows of transformers' own, all after the same prompt."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        self.model, self.cache = model, {cache_argument(model.forward): DynamicCache(config=model.config)}
        with torch.inference_mode():
            model(input_ids=prompt.expand(ROWS, -1), **self.cache, use_cache=True)

    @torch.inference_mode()
    def step(self, token: int) -> torch.Tensor:
        ids = torch.full((ROWS, 1), token)
        logits: torch.Tensor = self.model(input_ids=ids, **self.cache, use_cache=True).logits[:, -1]
        return logits


class Ours:
    """Sixteen candidates that leave one prompt."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        self.transformer = Transformer(model)
        tree = self.transformer.cache.open()
        trunk = tree.branch()
        self.transformer.logits([ForwardInput(trunk, prompt[0].tolist())])
        tree.keep(trunk)
        self.branches = [tree.branch() for _ in range(ROWS)]

    def step(self, token: int) -> torch.Tensor:
        outputs: list[Any] = self.transformer.logits([ForwardInput(branch, [token]) for branch in self.branches])
        return torch.stack([output.value for output in outputs])


def ratios(family: str, repeats: int) -> list[float]:
    prompt = torch.arange(PROMPT)[None] + 7
    plain, ours = Plain(made(family), prompt), Ours(made(family), prompt)
    found = []
    for i in range(repeats):
        times = []
        for each in (plain, ours) if i % 2 else (ours, plain):
            began = time.perf_counter()
            logits = each.step(7 + i)
            times.append((each, time.perf_counter() - began, logits))
        by = {type(each): (seconds, logits) for each, seconds, logits in times}
        assert torch.allclose(by[Plain][1], by[Ours][1], atol=1e-3)
        found.append(by[Ours][0] / by[Plain][0])
    return found[4:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    known = {}
    for family in FAMILIES:
        found = sorted(ratios(family, options.repeats))
        known[family] = {"median": statistics.median(found), "least": found[0], "greatest": found[-1]}
        print(family, {name: round(value, 2) for name, value in known[family].items()}, flush=True)
    RESULTS.write_text(json.dumps({"a step of 16 over a plain batched forward": known}, indent=2) + "\n")


if __name__ == "__main__":
    main()
