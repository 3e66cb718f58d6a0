"""Caches grow only as far as the machine has memory left, whatever their budget was when the engine loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import internals
import psutil
import pytest
import torch
from conftest import Start

from cards_integrations.decoding import Sampling
from cards_integrations.engine import Request
from cards_integrations.errors import OutOfMemory
from cards_integrations.transformer import free_memory
from cards_integrations.transformer.kv_memory import RESERVE, budget

PLENTY = 2**40


class Machine:
    """What the machine says that it has left."""

    def __init__(self) -> None:
        self.free = PLENTY

    def __call__(self, device: torch.device) -> int:
        return self.free


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr("cards_integrations.engine.worker.free_memory", found)
    return found


def request(tokens: int, seed: int = 1) -> Request:
    return Request(" ".join(["w9", "w20"] * (tokens // 2)), Sampling(), max_tokens=8, seed=seed, timeout=60)


def test_a_machine_without_memory_refuses_by_name_and_goes_on_later(
    start: Start, models: Callable[..., str], machine: Machine
) -> None:
    engine = start(models("llama"), prefix_reuse=False)
    expected = engine.run(request(80)).token_ids
    internals.language_model(engine).reset()  # the cache is as small as at first
    machine.free = RESERVE
    with pytest.raises(OutOfMemory, match=r"This machine has 256 MiB of memory left.*other processes"):
        engine.run(request(80))
    machine.free = PLENTY
    assert engine.run(request(80)).token_ids == expected


def test_finished_texts_are_given_back_first(start: Start, models: Callable[..., str], machine: Machine) -> None:
    engine = start(models("llama"))
    for seed in range(3):
        engine.run(Request(" ".join([f"w{10 + seed}", "w20"] * 50), Sampling(), max_tokens=8, seed=seed))
    assert engine.inspect().cached_prefixes
    memory = internals.memory(engine)
    memory.free = lambda: RESERVE if engine_has_prefixes() else PLENTY

    def engine_has_prefixes() -> bool:
        return memory.used > sum(cache.bytes for cache in memory.caches)

    assert memory.evict_for(1)
    assert not engine.inspect().cached_prefixes


def test_the_budget_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    found = free_memory.free_memory(cpu)
    assert 0 < found <= psutil.virtual_memory().total
    assert budget(1e6, cpu) == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("6000000\n")
    assert free_memory.free_memory(cpu) > 10**7
    (tmp_path / "memory.max").write_text("8000000\n")
    (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 500000\n")
    assert free_memory.free_memory(cpu) == 2_500_000
    assert budget(0.5, cpu) == 1_250_000
