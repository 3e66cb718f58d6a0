"""The benchmark of an accelerator runs at toy size where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.models
def test_the_accelerator_benchmark_at_toy_size() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--toy", "--batch", "1", "4", "--tokens", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "'same answers': '12 of 12'" in done.stdout
    for method in ("plain", "best-of-20", "CARDS, acceptance 0.2", "CARDS, acceptance 0.5"):
        assert done.stdout.count(f"{method:<24} batch") == 2
    assert done.stdout.count("simulated over plain") == 10
