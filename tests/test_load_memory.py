"""How much memory of the host a load takes beyond the weights that it makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

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
FLOAT, BFLOAT = "float32", "bfloat16"


def zeros(folder: Path, dtype: torch.dtype) -> str:
    """A model of 460 MB in float32, a third of them two tables; in some seconds less than a random one takes."""
    config = tiny.config("llama", num_attention_heads=8, num_key_value_heads=4, **LARGE)
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in AutoModelForCausalLM.from_config(config).state_dict().items()}
    config.dtype = dtype
    config.save_pretrained(folder)
    weights = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tiny.words().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("stored", "dtype"), [(FLOAT, FLOAT), (BFLOAT, FLOAT), (FLOAT, BFLOAT)], ids=["as stored", "widened", "narrowed"]
)
def test_a_load_takes_little_more_than_the_weights(tmp_path: Path, stored: str, dtype: str) -> None:
    small = tiny.save(tmp_path / "small", tiny.causal(), tiny.words())
    large = zeros(tmp_path / "large", getattr(torch, stored))
    ran = subprocess.run([sys.executable, "-c", LOAD, small, large, dtype], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    weights, taken = map(int, ran.stdout.split())
    assert weights > 2e8
    assert taken < 1.2 * weights, taken / weights
