"""GGUF files are models like any other: converted once, and what cannot be read is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import tiny_gguf
import torch
from conftest import Start

from cards_integrations.decoding import BestOfN, Sampling
from cards_integrations.engine import Request
from cards_integrations.errors import ModelError
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.resolve import resolve_model
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.models.sampling import Sampler
from cards_integrations.paths import cache_dir
from cards_integrations.rewards import JudgeReward

IDS = torch.tensor([[5, 9, 30, 77, 4]])


def loader() -> ModelLoader:
    return ModelLoader(Placement(device="cpu", dtype="float32"))


@pytest.mark.parametrize("by", ["file", "folder"])
@torch.inference_mode()
def test_a_file_is_the_model_that_it_was_made_of(tmp_path: Path, by: str) -> None:
    file = tiny_gguf.write(tmp_path / "llama.gguf")
    (tmp_path / "mmproj-llama.gguf").touch()  # for images
    model, tokenizer = loader().causal(LocalModel(model=str(file if by == "file" else tmp_path)))
    torch.testing.assert_close(model(IDS).logits, tiny_gguf.model()(IDS).logits, atol=1e-5, rtol=1e-5)
    own = tiny.byte_pairs()
    assert tokenizer("the cat sat on it")["input_ids"] == own("the cat sat on it")["input_ids"]


@torch.inference_mode()
def test_packed_weights_are_unpacked(tmp_path: Path) -> None:
    model, _ = loader().causal(LocalModel(model=str(tiny_gguf.write(tmp_path / "packed.gguf", packed=True))))
    plain = tiny_gguf.model()(IDS).logits
    assert float((model(IDS).logits - plain).norm() / plain.norm()) < 0.1
    assert getattr(model, "hf_quantizer", None) is None


def test_it_is_converted_once_and_anew_when_it_has_changed(tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "llama.gguf")
    first = Path(resolve_model(str(file)))
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(file)) == str(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert not list((cache_dir() / "gguf").glob("*.partial"))
    tiny_gguf.write(file, packed=True)
    assert resolve_model(str(file)) != str(first)


def test_it_drafts_and_judges(tmp_path: Path, start: Start) -> None:
    file = str(tiny_gguf.write(tmp_path / "llama.gguf"))
    engine = start(file)
    greedy = engine.run(Request("the cat", Sampling(), sampler=Sampler(temperature=0), max_tokens=8))
    ids = tiny.byte_pairs()("the cat", return_tensors="pt")["input_ids"]
    plain = tiny_gguf.model().generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=tiny.EOS)
    assert list(greedy.token_ids) == [i for i in plain[0, ids.shape[1] :].tolist() if i != tiny.EOS]
    copy = shutil.copy(file, tmp_path / "judge.gguf")
    judge = JudgeReward(model=LocalModel(model=str(copy)), words=("the", "cat"))
    assert engine.run(Request("the cat", BestOfN(n=2), judge, max_tokens=4, seed=1)).reward is not None


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    unknown = tiny_gguf.write(tmp_path / "unknown.gguf", architecture="rwkv6")
    with pytest.raises(ModelError, match=r"unknown\.gguf.*transformers cannot read this GGUF file.*rwkv6"):
        resolve_model(str(unknown))
    half = tmp_path / "half.gguf"
    half.write_bytes(tiny_gguf.write(tmp_path / "whole.gguf").read_bytes()[:20_000])
    with pytest.raises(ModelError, match=r"half\.gguf.* is no whole GGUF file"):
        resolve_model(str(half))
    with pytest.raises(ModelError, match=r"has 3 GGUF files .*pass the path of one"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"there is no such file"):
        resolve_model(str(tmp_path / "none.gguf"))
    part = tmp_path / "parts" / "large-00001-of-00002.gguf"
    part.parent.mkdir()
    part.touch()
    with pytest.raises(ModelError, match=r"one part of a GGUF file that was split.*--merge"):
        resolve_model(str(part))
    assert not list((cache_dir() / "gguf").glob("*.partial"))
