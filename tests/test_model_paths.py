"""What `model=` names, and what is said of a name that leads nowhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from conftest import Start
from tokenizers import processors

from cards_integrations.decoding import Sampling
from cards_integrations.engine import Request
from cards_integrations.errors import ModelError, SettingsError
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.resolve import resolve_model
from cards_integrations.models.local.settings import LocalModel, Placement


def loader() -> ModelLoader:
    return ModelLoader(Placement(device="cpu", dtype="float32"))


@pytest.mark.parametrize("name", ["./tiny_lmm", "../tiny_lmm", "/no/such/model", "~/no/such", "a/b/c", "tiny_lmm/"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match=r"model='.*': there is no such file or directory"):
        resolve_model(name)


def test_a_file_is_no_model(models: Callable[..., str]) -> None:
    with pytest.raises(ModelError, match=r"this is a file; pass the directory"):
        resolve_model(f"{models('llama')}/model.safetensors")


def test_a_hub_id_is_left_to_the_hub() -> None:
    assert resolve_model("owner/name") == "owner/name"


def test_home_is_expanded(models: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(models("llama"))
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model(f"~/{folder.name}") == str(folder)


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no config\.json in this directory"):
        loader().causal(LocalModel(model=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"It is an adapter: pass it as adapter="):
        loader().causal(LocalModel(model=str(tmp_path)))


def test_an_adapter_that_is_none_is_told_before_anything_is_read(
    models: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "adapters" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "adapters")
    said = {
        "./mien": (ModelError, r"adapter='\./mien': there is no such file or directory .*Did you mean 'mine'"),
        "./mine": (ModelError, r"adapter='\./mine': there is no adapter_config\.json in this directory"),
        "~/adapters/mine": (ModelError, r"adapter='~/adapters/mine': there is no adapter_config\.json"),
        "mien": (SettingsError, r"adapter='mien': pass a hub id .*Did you mean '\./mine'"),
        "owner/name": (ModelError, r"adapter='owner/name' cannot be loaded"),
    }
    for adapter, (error, match) in said.items():
        with pytest.raises(error, match=match):
            loader().causal(LocalModel(model=models("llama"), adapter=adapter))


# --- tokenizers ---


def test_a_tokenizer_that_reads_nothing(tmp_path: Path) -> None:
    """By the type of the model, transformers takes this word-level vocabulary for one of byte pairs."""
    folder = tiny.save(tmp_path, tiny.causal("qwen2"), tiny.words())
    with pytest.raises(ModelError, match=r"Qwen2Tokenizer.*encodes words of its own vocabulary to nothing"):
        loader().causal(LocalModel(model=folder))


def test_a_beginning_beyond_the_embedding(models: Callable[..., str], tmp_path: Path) -> None:
    tokenizer = tiny.words(bos_token="<s>")
    assert tokenizer.bos_token_id == 48
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 48)]
    )
    folder = tiny.save(tmp_path, tiny.causal("llama"), tokenizer)
    with pytest.raises(ModelError, match=r"begins or ends every text with '<s>'.*beyond the 48 rows"):
        loader().causal(LocalModel(model=folder))


# --- placement ---


def test_layers_are_spread_by_accelerate(models: Callable[..., str], start: Start) -> None:
    """On one device it changes nothing."""
    request = Request("w9 w20", Sampling(), max_tokens=6, seed=1)
    assert start(models("llama"), device_map="auto").run(request).text == start(models("llama")).run(request).text


def test_spreading_needs_accelerate(models: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(ModelError, match=r"device_map='auto' needs a library: run `pip install accelerate`"):
        ModelLoader(Placement(device="cpu", device_map="auto")).causal(LocalModel(model=models("llama")))


def test_a_config_that_allows_any_length(models: Callable[..., str], tmp_path: Path) -> None:
    """Like XLNet's, which says -1."""
    folder = Path(shutil.copytree(models("llama"), tmp_path / "endless"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": -1}))
    model, _ = loader().causal(LocalModel(model=str(folder)))
    from cards_integrations.models.local.resolve import UNLIMITED, max_positions

    assert max_positions(model.config) == UNLIMITED
