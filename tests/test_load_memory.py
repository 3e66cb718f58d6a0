"""How much memory of the host a load takes beyond the weights that it makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cards_integrations.models.local import tensor_files
from cards_integrations.models.local.tensor_files import TensorFile

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

LOAD = """
import re, sys
from pathlib import Path

import torch

from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

small, large, dtype = sys.argv[1:]
loader = ModelLoader(Placement(device="cpu", dtype=dtype))
loader.causal(LocalModel(model=small))  # all that is imported
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
before = memory("VmRSS")
model, _ = loader.causal(LocalModel(model=large))
print(sum(w.nbytes for w in model.parameters()), memory("VmHWM") - before)
"""
LARGE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 32, "head_dim": 64, "vocab_size": 40_000}
ONE_TABLE = {**LARGE, "num_hidden_layers": 8, "vocab_size": 200_000, "tie_word_embeddings": True}
FLOAT, BFLOAT = "float32", "bfloat16"


def zeros(folder: Path, dtype: torch.dtype, sizes: dict[str, Any]) -> str:
    """A model of about 460 MB in float32; in some seconds less than a random one takes."""
    config = tiny.config("llama", num_attention_heads=8, num_key_value_heads=4, **sizes)
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in AutoModelForCausalLM.from_config(config).named_parameters()}
    config.dtype = dtype
    config.save_pretrained(folder)
    weights = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tiny.words().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("sizes", [LARGE, ONE_TABLE], ids=["two tables of a third", "a table of five sixths"])
@pytest.mark.parametrize(
    ("stored", "dtype"), [(FLOAT, FLOAT), (BFLOAT, FLOAT), (FLOAT, BFLOAT)], ids=["as stored", "widened", "narrowed"]
)
def test_a_load_takes_little_more_than_the_weights(
    tmp_path: Path, stored: str, dtype: str, sizes: dict[str, Any]
) -> None:
    small = tiny.save(tmp_path / "small", tiny.causal(), tiny.words())
    large = zeros(tmp_path / "large", getattr(torch, stored), sizes)
    ran = subprocess.run([sys.executable, "-c", LOAD, small, large, dtype], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    weights, taken = map(int, ran.stdout.split())
    assert weights > 2e8
    assert taken < 1.2 * weights, taken / weights


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (7, 3)], ids=str)
def test_pieces_make_the_whole(
    tmp_path: Path, stored: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "PIECE", 4)
    whole = (torch.randn(shape) * 100).to(stored)
    save_file({"first": torch.ones(3), "it": whole, "last": torch.ones(2)}, tmp_path / "some", {"format": "pt"})
    with TensorFile(tmp_path / "some", framework="pt") as file:
        for dtype in (torch.float32, torch.bfloat16, None):
            read = tensor_files._read(file.get_slice("it"), "cpu", dtype)
            assert torch.equal(read, whole.to(dtype or stored))
            assert read.dtype == (dtype or stored)
