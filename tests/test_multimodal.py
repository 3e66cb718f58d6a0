"""Of a model for images and text, the part that writes text is kept; the rest takes no memory."""

from __future__ import annotations

from pathlib import Path

import census
import pytest
from conftest import Start
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from cards_integrations.decoding import Sampling
from cards_integrations.engine import Request
from cards_integrations.errors import ModelError
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement


@pytest.fixture
def composite(tmp_path: Path) -> str:
    return str(census.build("qwen3_vl", tmp_path / "composite", AutoModelForImageTextToText))


@pytest.mark.parametrize("bits", [None, "int8"])
def test_what_reads_no_text_is_gone(composite: str, bits: str | None) -> None:
    spec = LocalModel.model_validate({"model": composite, "quantization": bits})
    model, _ = ModelLoader(Placement(device="cpu", dtype="auto")).causal(spec)
    names = {name.split(".")[1] for name in model.state_dict() if name.startswith("model.")}
    assert names == {"language_model"}


def test_half_of_it_is_refused(composite: str, tmp_path: Path) -> None:
    file = Path(composite) / "model.safetensors"
    weights = {name: w for name, w in load_file(file).items() if "language_model.layers.1." not in name}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for .*language_model\.layers\.1"):
        ModelLoader(Placement(device="cpu")).causal(LocalModel(model=composite))


def test_it_writes(composite: str, start: Start) -> None:
    answer = start(composite).run(Request("DUf", Sampling(), max_tokens=4, seed=1))
    assert answer.token_ids
