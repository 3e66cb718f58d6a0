"""The promises of docs/security.md: what is not trusted is not executed, not shown, and stays where it is."""

# ruff: noqa: E501, SIM117

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import faces
import pytest
import tiny
import torch
from conftest import Start
from langchain_core.callbacks import BaseCallbackHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import ChatMessage

from cards_integrations import CardsLLM, CardsSettings, ChatCards
from cards_integrations.decoding import Cards, FixedLength, Sampling
from cards_integrations.engine import Request
from cards_integrations.errors import CardsError, ModelError, RewardError, SettingsError
from cards_integrations.models import VllmModel
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.models.sources import context_window
from cards_integrations.rewards import ClassifierReward, GroundednessReward, LengthReward, RemoteReward, as_reward

PACKAGE = Path(__file__).parents[1] / "cards_integrations"
SECRET = "sesame-4711-open"
GUIDED = Cards(target_reward=1.0, beta=0.7, boundary=FixedLength(length=2))

# --- what the code may do ---

NEVER_IMPORTED = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess", "pty", "code", "runpy"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "system", "popen", "spawnv", "execv", "import_module"}
ALLOWED = {
    ("__init__.py", "import_module"),  # of the names in its own table, on first use
    ("engine/__init__.py", "import_module"),  # the same
}
YAML = {"safe_load", "safe_dump", "MarkedYAMLError"}
LOADS = {
    ("chat/grammar.py", "json"), ("chat/message.py", "json"), ("chat/tool_formats.py", "json"),
    ("langchain/structured_output.py", "json"), ("models/local/resolve.py", "json"),
    ("models/local/reward_heads.py", "json"), ("models/local/tensor_files.py", "json"), ("registry.py", "json"),
    ("rewards/value_head.py", "json"), ("server/call.py", "json"), ("study/compare.py", "json"), ("study/prompts.py", "json"), ("study/rows.py", "json"),
}  # fmt: skip


def trees() -> Iterator[tuple[str, ast.AST]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            yield file.relative_to(PACKAGE).as_posix(), node


def test_nothing_that_executes_data_is_imported_or_called() -> None:
    found: set[tuple[str, str]] = set()
    for file, node in trees():
        if isinstance(node, ast.Import):
            found |= {(file, name.name) for name in node.names if name.name.split(".")[0] in NEVER_IMPORTED}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in NEVER_IMPORTED:
            found.add((file, str(node.module)))
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            owner = ""
            if isinstance(node.func, ast.Attribute):
                name, owner = node.func.attr, ast.unparse(node.func.value)
            if name in NEVER_CALLED and owner in ("", "os", "builtins", "importlib"):
                found.add((file, name))
    assert found == ALLOWED


def test_files_are_read_as_yaml_json_or_safetensors_only() -> None:
    yaml, loads = set(), set()
    for file, node in trees():
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        if owner == "yaml":
            yaml.add(node.attr)
        if node.attr in ("load", "loads", "unsafe_load", "full_load") and owner in (
            "json",
            "torch",
            "np",
            "numpy",
            "yaml",
        ):
            loads.add((file, owner))
        assert node.attr != "allow_pickle"
    assert yaml == YAML
    assert {owner for _, owner in loads} == {"json"}
    assert loads <= LOADS


def test_remote_code_is_off_unless_a_setting_says_otherwise() -> None:
    given = {
        (file, ast.unparse(node.value))
        for file, node in trees()
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
    }
    assert {value for _, value in given} <= {
        "spec.trust_remote_code",
        "source.trust_remote_code",
        "self.trust_remote_code",
        "False",
    }
    assert len(given) >= 3
    assert not LocalModel().trust_remote_code
    assert not VllmModel(base_url="http://h", model="m").trust_remote_code


# --- weights and code of a model ---


class Bomb:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """What code would leave behind if it ran."""
    mark = tmp_path / "it-ran"
    yield mark
    assert not mark.exists()


def with_pickled_weights(folder: Path, model: Any, mark: Path) -> str:
    tiny.save(folder, model, tiny.words())
    (folder / "model.safetensors").unlink()
    torch.save({**model.state_dict(), "bomb": Bomb(mark)}, folder / "pytorch_model.bin")
    return str(folder)


def test_pickled_weights_are_refused(tmp_path: Path, mark: Path, start: Start, models: Callable[..., str]) -> None:
    causal = with_pickled_weights(tmp_path / "lm", tiny.causal(), mark)
    with pytest.raises(ModelError, match=r"lm.*cannot be loaded.*safetensors"):
        start(causal).run(Request("w6", Sampling(chunk=3), max_tokens=2))

    classifier = with_pickled_weights(tmp_path / "rm", tiny.classifier(), mark)
    with pytest.raises(ModelError, match=r"rm.*cannot be loaded.*safetensors"):
        start(models("llama")).run(Request("w6", GUIDED, ClassifierReward(model=classifier), max_tokens=2))


def test_pickled_weights_without_a_bomb_are_refused_as_well(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "lm"
    tiny.save(folder, tiny.causal(), tiny.words())
    (folder / "model.safetensors").unlink()
    torch.save(tiny.causal().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        start(folder).run(Request("w6", Sampling(chunk=3), max_tokens=2))


def lora(folder: Path) -> Path:
    """An adapter as peft saves it, on the tiny model."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny.causal(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder)
    return folder


def test_a_pickled_adapter_is_refused(tmp_path: Path, mark: Path, models: Callable[..., str]) -> None:
    from safetensors.torch import load_file

    folder = lora(tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    loader = ModelLoader(Placement(device="cpu", dtype="float32"))
    with pytest.raises(ModelError, match="adapter"):
        loader.causal(LocalModel(model=models("llama"), adapter=str(folder)))


def test_an_adapter_in_safetensors_is_read(tmp_path: Path, models: Callable[..., str]) -> None:
    loader = ModelLoader(Placement(device="cpu", dtype="float32"))
    model, _ = loader.causal(LocalModel(model=models("llama"), adapter=str(lora(tmp_path / "adapter"))))
    assert type(model).__name__ == "LlamaForCausalLM"


def with_code(folder: Path, mark: Path, **config: Any) -> str:
    """A model directory that brings code of its own, for the config, the model and the tokenizer."""
    tiny.save(folder, tiny.causal(), tiny.words())
    (folder / "mine.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Config: ...\nclass Model: ...\n")
    mine = {
        "AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model",
        "AutoModelForSequenceClassification": "mine.Model", "AutoTokenizer": ["mine.Model", None],
    }  # fmt: skip
    for name in ("config.json", "tokenizer_config.json"):
        written = json.loads((folder / name).read_text())
        if name == "config.json":
            written |= config
        (folder / name).write_text(json.dumps({**written, "auto_map": mine}))
    return str(folder)


def test_the_code_of_a_model_does_not_run(tmp_path: Path, mark: Path, start: Start, models: Callable[..., str]) -> None:
    folder = with_code(tmp_path / "own", mark, model_type="something-of-its-own")
    with pytest.raises(ModelError, match="own"):
        start(folder).run(Request("w6", Sampling(chunk=3), max_tokens=2))
    with pytest.raises(ModelError, match="own"):
        start(models("llama")).run(Request("w6", GUIDED, ClassifierReward(model=folder), max_tokens=2))
    with pytest.raises(ModelError, match="own"):
        context_window(LocalModel(model=folder))
    assert not mark.exists()


def test_a_known_model_with_code_is_loaded_without_it(tmp_path: Path, mark: Path, start: Start) -> None:
    folder = with_code(tmp_path / "llama", mark)
    with pytest.raises(ModelError, match="llama") if _refuses(folder) else _nothing():
        assert start(folder).run(Request("w6", Sampling(chunk=3), max_tokens=2)).token_ids


def _refuses(folder: str) -> bool:
    """Does transformers itself refuse a tokenizer of its own class without its code?"""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:
        return True
    return False


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_the_code_of_an_embedding_model_does_not_run(tmp_path: Path, mark: Path, start: Start, models: Any) -> None:
    pytest.importorskip("sentence_transformers")
    folder = Path(with_code(tmp_path / "embed", mark))
    modules = [{"idx": 0, "name": "0", "path": "", "type": "mine.Model"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    reward = GroundednessReward(by="embedding", model=str(folder))
    with pytest.raises(ModelError):
        start(models("llama")).run(Request("w6", GUIDED, reward, max_tokens=2, context=("w7",)))


# --- settings files ---

MODULE = "a_module_that_leaves_a_mark"


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module on the path; the file that it writes when it is imported."""
    mark = tmp_path / "imported"
    code = f"open({str(mark)!r}, 'w').close()\ndef score(prompt, texts):\n    return [1.0 for _ in texts]\n"
    (tmp_path / f"{MODULE}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("CARDS_ALLOW_IMPORTS", raising=False)
    yield mark
    sys.modules.pop(MODULE, None)


NAMED = {"kind": "function", "function": f"{MODULE}.score"}
HIDDEN = [
    NAMED,
    {"kind": "weighted", "rewards": [NAMED], "weights": [1.0]},
    {"kind": "min", "rewards": [{"kind": "length", "target": 3}, NAMED]},
    {"kind": "gate", "gate": NAMED, "reward": {"kind": "length", "target": 3}},
]


@pytest.mark.parametrize("reward", HIDDEN, ids=lambda reward: reward["kind"])
def test_no_setting_imports_code(
    importable: Path, reward: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cards.yaml"
    file.write_text(json.dumps({"reward": reward}))
    llm = faces.cards_llm()
    monkeypatch.setenv("CARDS_REWARD", json.dumps(reward))
    attempts: list[Callable[[], Any]] = [
        lambda: CardsSettings.from_yaml(file), lambda: CardsLLM.from_settings(file), lambda: CardsSettings(reward=reward),
        lambda: CardsSettings(), lambda: CardsLLM(), lambda: ChatCards(), lambda: as_reward(reward),
        lambda: as_reward(json.dumps(reward)), lambda: llm.align("Hello", reward=reward, max_tokens=1),
        lambda: llm.invoke("Hello", reward=json.dumps(reward), max_tokens=1),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(ValueError):
            attempt()
    assert not importable.exists()
    assert MODULE not in sys.modules


def test_a_reader_who_allows_it_imports_and_no_other(importable: Path, tmp_path: Path) -> None:
    file = tmp_path / "cards.yaml"
    file.write_text(json.dumps({"reward": NAMED}))
    assert CardsSettings.from_yaml(file, allow_imports=True).reward is not None
    assert importable.exists()
    with pytest.raises(ValueError, match="would import code"):
        CardsSettings.from_yaml(file)
    file.write_text(json.dumps({"reward": NAMED, "max_tokens": 0}))
    with pytest.raises(ValueError, match="max_tokens"):
        CardsSettings.from_yaml(file, allow_imports=True)
    with pytest.raises(ValueError, match="would import code"):
        CardsSettings(reward=NAMED)


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:pathlib.Path.touch [MARK]",
        "model: !!python/object/new:pathlib.Path [MARK]",
        "model: !!python/name:os.system",
        "model: !!python/module:os",
        "!!python/object/apply:os.system ['touch MARK']",
    ],
)
def test_yaml_makes_no_objects(text: str, tmp_path: Path, mark: Path) -> None:
    file = tmp_path / "cards.yaml"
    file.write_text(text.replace("MARK", str(mark)))
    with pytest.raises(SettingsError, match="cannot be read"):
        CardsSettings.from_yaml(file)


# --- plug-ins ---

PLUGIN = """
import os, pathlib
pathlib.Path(os.environ["MARK"]).touch()
from typing import Literal
from cards_integrations.rewards import Reward

class Mine(Reward):
    kind: Literal["marked"] = "marked"
"""
ASKED = """
import json, os, pathlib, sys
import cards_integrations
from cards_integrations import CardsSettings
from cards_integrations.rewards import as_reward
from cards_integrations.rewards.registry import known_rewards

mark, found = pathlib.Path(os.environ["MARK"]), {}
found["names"] = "marked" in known_rewards()
as_reward({"kind": "length", "target": 3})
CardsSettings(reward="sentiment")
for wrong in ({"kind": "markd"}, "markd", {"no": "kind"}):
    try:
        as_reward(wrong)
    except ValueError:
        pass
found["before"] = mark.exists()
as_reward({"kind": "marked"})
found["after"] = mark.exists()
print(json.dumps(found))
"""


def test_a_plug_in_runs_when_its_kind_is_asked_for_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "cards_marked.py").write_text(PLUGIN)
    info = tmp_path / "cards_marked-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cards_marked\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cards_integrations.rewards]\nmarked = cards_marked:Mine\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "MARK": str(tmp_path / "mark")}
    ran = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {"names": True, "before": False, "after": True}


# --- keys ---


class Repeats(BaseHTTPRequestHandler):
    """A server that says back what it was sent, headers included."""

    status: ClassVar[int] = 200
    keys: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.keys.append(self.headers["Authorization"])
        said: dict[str, Any] = {"scores": [1.0] * len(json.loads(body)["responses"]), "headers": str(self.headers)}
        if self.status != 200:
            said = {"error": f"what is {self.headers['Authorization']}?"}
        data = json.dumps(said).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repeated", str(self.headers["Authorization"]))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Repeats)
    Repeats.status = 200
    Repeats.keys.clear()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


def remote(url: str, **more: Any) -> RemoteReward:
    return RemoteReward(**{"url": url, "protocol": "json", "api_key": SECRET, "retries": 0, **more})


class Callbacks(BaseCallbackHandler):
    """All that LangChain tells a tracer, LangSmith's for one."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self.told.append(repr((args, kwargs)))

    def on_custom_event(self, *args: Any, **kwargs: Any) -> None:
        self.told.append(repr((args, kwargs)))

    def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.told.append(repr((args, kwargs)))

    def on_llm_error(self, *args: Any, **kwargs: Any) -> None:
        self.told.append(repr((args, kwargs)))


class Events(BaseEventHandler):
    """All that LlamaIndex tells its instrumentation."""

    told: ClassVar[list[str]] = []

    @classmethod
    def class_name(cls) -> str:
        return "Events"

    def handle(self, event: Any, **kwargs: Any) -> None:
        type(self).told += [repr(event), event.model_dump_json(fallback=repr)]


@pytest.fixture
def events() -> Iterator[list[str]]:
    handler, dispatcher = Events(), get_dispatcher()
    Events.told.clear()
    dispatcher.add_event_handler(handler)
    yield Events.told
    dispatcher.event_handlers.remove(handler)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Every logger at its most talkative."""
    caplog.set_level(logging.NOTSET)
    for name in ("cards_integrations", "httpx", "httpcore", "asyncio", "tenacity", "langchain", "llama_index"):
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


def options(reward: Any) -> dict[str, Any]:
    return faces.options(reward=reward, max_tokens=4, decoding=Cards(target_reward=0.5, beta=0.5))


@pytest.mark.xfail(strict=True, reason="a log at DEBUG has the key that a server repeats in a header")
def test_the_key_is_sent_and_nobody_else_is_told(
    server: str, events: list[str], logged: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    llm, chat, callbacks = CardsLLM(**options(remote(server))), ChatCards(**options(remote(server))), Callbacks()
    told = [repr(llm), str(llm), repr(llm.options()), repr(chat), str(chat), repr(chat.options())]
    message = chat.invoke("Hello", config={"callbacks": [callbacks]})
    list(chat.stream("Hello", config={"callbacks": [callbacks]}))
    told += [repr(message), message.model_dump_json(), repr(chat._get_ls_params()), repr(chat._identifying_params)]
    told += [repr(chat._get_invocation_params()), repr(chat.dict()), json.dumps(chat.to_json(), default=repr)]
    told += [repr(llm.chat([ChatMessage(content="Hello")])), repr(llm.to_dict())]
    answer = llm.align("Hello")
    told += [repr(answer), repr(answer.to_dict()), repr(answer.summary()), answer._repr_html_()]
    settings = CardsSettings(reward=remote(server))
    told += [settings.to_yaml(), settings.model_dump_json(), repr(settings.model_dump()), repr(settings), str(settings)]
    told += [*callbacks.told, *events, logged.text]
    assert len(callbacks.told) >= 4
    assert events
    assert set(Repeats.keys) == {f"Bearer {SECRET}"}
    assert [text for text in told if SECRET in text] == []
    llm.close()
    chat.close()


@pytest.mark.parametrize("status", [401, 404, 429, 500])
@pytest.mark.parametrize("given", ["settings", "environment"])
@pytest.mark.xfail(strict=True, reason="a log at DEBUG has the key that a server repeats in a header")
def test_no_failure_shows_the_key(
    server: str, status: int, given: str, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CARDS_REWARD_API_KEY", SECRET)
    Repeats.status = status
    callbacks = Callbacks()
    with closing(ChatCards(**options(remote(server, api_key=SECRET if given == "settings" else None)))) as chat:
        with pytest.raises(RewardError) as caught:
            chat.invoke("Hello", config={"callbacks": [callbacks]})
    whole = "".join(traceback.format_exception(caught.value))
    assert set(Repeats.keys) == {f"Bearer {SECRET}"}
    assert str(status) in whole
    assert [text for text in (whole, repr(caught.value), logged.text, *callbacks.told) if SECRET in text] == []


def test_a_server_that_is_not_there_is_named_without_the_key(logged: pytest.LogCaptureFixture) -> None:
    with (
        CardsLLM(**options(remote("http://127.0.0.1:9"))) as llm,
        pytest.raises(RewardError, match=r"127\.0\.0\.1:9") as caught,
    ):
        llm.align("Hello")
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + logged.text


SECRETS: dict[str, Callable[[], Any]] = {
    "RemoteReward": lambda: remote("http://h"),
    "VllmModel": lambda: VllmModel(base_url="http://h", model="m", tokenizer="t", api_key=SECRET),
    "CardsLLM with RemoteReward": lambda: CardsLLM(reward=remote("http://h")),
    "CardsLLM with VllmModel": lambda: CardsLLM(model=SECRETS["VllmModel"]()),
    "ChatCards with VllmModel": lambda: ChatCards(model=SECRETS["VllmModel"](), reward=None, decoding="sampling"),
    "CardsSettings with VllmModel": lambda: CardsSettings(model=SECRETS["VllmModel"]()),
}


@pytest.mark.parametrize("name", SECRETS)
def test_the_key_is_in_no_representation(name: str) -> None:
    made = SECRETS[name]()
    told = [repr(made), str(made), f"{made}", made.model_dump_json(), repr(made.model_dump()), repr(made.model_copy())]
    if isinstance(made, (ChatCards, CardsLLM)):
        told += [repr(made._get_ls_params()), repr(made.options())]
    if isinstance(made, CardsSettings):
        told.append(made.to_yaml())
    assert [text for text in told if SECRET in text] == []


@pytest.mark.parametrize("name", SECRETS)
def test_the_key_is_in_no_pickle(name: str) -> None:
    assert SECRET.encode() not in pickle.dumps(SECRETS[name]())


WRONG: dict[str, dict[str, Any]] = {
    "a setting too many": {"nonsense": 1},
    "a wrong value": {"retries": -1},
    "a wrong address": {"url": "nowhere"},
    "a wrong kind": {"kind": "remot"},
}
REMOTE = {"kind": "remote", "url": "http://h", "protocol": "json", "api_key": SECRET}


def refusals(reward: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    """All the ways in which settings with a mistake are refused."""
    file = folder / "cards.yaml"
    file.write_text(json.dumps({"reward": reward}))
    llm = faces.cards_llm()

    def environment() -> Any:
        with monkeypatch.context() as patch:
            patch.setenv("CARDS_REWARD", json.dumps(reward))
            CardsLLM()

    return {
        "as_reward": lambda: as_reward(reward), "json": lambda: as_reward(json.dumps(reward)),
        "settings": lambda: CardsSettings(reward=reward), "llm": lambda: CardsLLM(reward=reward),
        "chat": lambda: ChatCards(reward=reward), "yaml": lambda: CardsSettings.from_yaml(file),
        "call": lambda: llm.align("Hello", reward=reward), "nested": lambda: CardsSettings(
            reward={"kind": "min", "rewards": [reward, {"kind": "length", "target": 3}]}
        ), "environment": environment,
    }  # fmt: skip


@pytest.mark.parametrize(
    "way", ["as_reward", "json", "settings", "llm", "chat", "yaml", "call", "nested", "environment"]
)
@pytest.mark.parametrize("wrong", WRONG)
def test_no_refusal_shows_the_key(way: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError) as caught:
        refusals({**REMOTE, **WRONG[wrong]}, tmp_path, monkeypatch)[way]()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("way", ["settings", "llm", "call", "yaml"])
def test_no_refusal_of_a_model_shows_the_key(way: str, tmp_path: Path) -> None:
    model = {"kind": "vllm", "base_url": "nowhere", "model": "m", "api_key": SECRET}
    file = tmp_path / "cards.yaml"
    file.write_text(json.dumps({"model": model}))
    ways: dict[str, Callable[[], Any]] = {
        "settings": lambda: CardsSettings(model=model), "llm": lambda: CardsLLM(model=model),
        "call": lambda: faces.cards_llm().align("Hello", model=model), "yaml": lambda: CardsSettings.from_yaml(file),
    }  # fmt: skip
    with pytest.raises(ValueError) as caught:
        ways[way]()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_broken_settings_file_is_refused_without_its_key(tmp_path: Path) -> None:
    file = tmp_path / "cards.yaml"
    file.write_text(f"reward: {{kind: remote, api_key: {SECRET}, url: [}}\n")
    with pytest.raises(SettingsError, match="cannot be read") as caught:
        CardsSettings.from_yaml(file)
    assert SECRET not in str(caught.value)


@pytest.mark.xfail(strict=True, reason="LangChain traces the arguments of a call as they are")
def test_a_call_with_a_key_is_not_traced_with_it(server: str) -> None:
    callbacks, reward = Callbacks(), {**REMOTE, "url": server, "retries": 0}
    with closing(ChatCards(**options(LengthReward(target=3)))) as chat:
        chat.invoke("Hello", config={"callbacks": [callbacks]}, reward=reward)
    assert Repeats.keys
    assert [text for text in callbacks.told if SECRET in text] == []


def test_a_model_of_a_call_is_not_traced_with_its_key() -> None:
    model = {"kind": "vllm", "base_url": "http://h", "model": "m", "api_key": SECRET}
    assert SECRET not in repr(ChatCards(**faces.options())._get_ls_params(model=model))


# --- HTML ---

INJECTIONS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '" onmouseover="alert(1)', "</style><script>", "</title>",
    "<!--", "-->", "<svg/onload=alert(1)>", "\0<script>", "&lt;script&gt;", "javascript:alert(1)", "{answer}",
]  # fmt: skip


@pytest.mark.parametrize("text", INJECTIONS)
def test_what_a_model_writes_is_never_markup(text: str) -> None:
    from html.parser import HTMLParser

    from cards_integrations.trace import Alignment, DraftTrace, Segment, ToolCall, Usage

    def page(text: str) -> list[Any]:
        draft = DraftTrace(0, text, (1,), 0.5, None, "rejected", {text: 1.0})
        answer = Alignment(
            text, (1,), (1,), 0.5, (Segment(text, (1,), 0.5, 1.0, (draft,)),), Usage(), "stop", 0.0, 1,
            model=text, method=text, content=text, tool_calls=(ToolCall("1", text, {text: text}),),
        )  # fmt: skip
        seen: list[Any] = []
        parser: Any = HTMLParser()
        parser.handle_starttag = lambda tag, attrs: seen.append((tag, attrs))
        parser.handle_endtag = lambda tag: seen.append(tag)
        parser.handle_comment = parser.handle_pi = parser.handle_decl = seen.append
        parser.feed(answer._repr_html_())
        parser.close()
        return seen

    assert page(text) == page("harmless")


# --- names and paths ---

PATHS = ["../../etc", "/etc/passwd", "a\0b/c", "/", "~/x", "a/../../b"]
WRITES = """
import json, os, sys
from pathlib import Path

written = []
def hook(event, args):
    if event == "open" and isinstance(args[0], str) and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        written.append(os.path.abspath(args[0]))
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree"):
        written.append(os.path.abspath(os.fsdecode(args[0])))
sys.addaudithook(hook)

from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.decoding import Cards, Sampling
from cards_integrations.decoding.base import Scale
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards import ClassifierReward, LengthReward
from cards_integrations.engine.scale_store import ScaleStore

names, good = json.loads(sys.argv[1]), sys.argv[2]
settings, outcomes, store = EngineSettings(device="cpu", dtype="float32"), [], ScaleStore()
written.clear()
for name in names:
    for model, reward in (
        (LocalModel(model=name), None),
        (LocalModel(model=good, adapter=name), None),
        (LocalModel(model=good), ClassifierReward(model=name)),
        (LocalModel(model=good), ClassifierReward(model=good, adapter=name)),
    ):
        engine = Engine(model, settings)
        decoding = Sampling(chunk=2) if reward is None else Cards(target_reward=1.0, beta=1.0)
        try:
            engine.run(Request("w6", decoding, reward, max_tokens=2))
            outcomes.append("answered")
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        engine.close()
    store.put(LocalModel(model=name), LengthReward(target=3), Scale(mean=0.0, std=1.0))
    assert store.get(LocalModel(model=name), LengthReward(target=3)) is not None
print(json.dumps({"outcomes": outcomes, "written": sorted(set(written))}))
"""


def test_no_name_leads_out_of_the_cache(models: Callable[..., str], tmp_path: Path) -> None:
    """Whatever a model, a reward or an adapter is called: it is refused by name, and nothing is written elsewhere."""
    cache = tmp_path / "cache"
    environment = {**os.environ, "CARDS_CACHE_DIR": str(cache), "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch sets it in a process that has met its compiler
    ran = subprocess.run(
        [sys.executable, "-c", WRITES, json.dumps(PATHS), models("llama")],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    kinds = {outcome.partition(":")[0] for outcome in found["outcomes"]}
    assert kinds <= {"ModelError", "SettingsError"}, found["outcomes"]
    outside = [path for path in found["written"] if not path.startswith((str(tmp_path), "/dev/null"))]
    assert outside == []
    assert len(list((cache / "scales").iterdir())) == len(PATHS)


def test_a_link_out_of_a_model_is_not_quoted(tmp_path: Path, start: Start) -> None:
    hidden = tmp_path / "hidden.txt"
    hidden.write_text(SECRET)
    folder = tmp_path / "linked"
    tiny.save(folder, tiny.causal(), tiny.words())
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).unlink()
        (folder / name).symlink_to(hidden)
        with pytest.raises(CardsError) as caught:
            start(folder).run(Request("w6", Sampling(chunk=3), max_tokens=2))
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_link_in_the_place_of_a_scale_is_replaced_and_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cards_integrations.decoding.base import Scale
    from cards_integrations.engine.scale_store import ScaleStore

    monkeypatch.setenv("CARDS_CACHE_DIR", str(tmp_path / "cache"))
    store, model, reward = ScaleStore(), LocalModel(model="m/m"), LengthReward(target=3)
    store.put(model, reward, Scale(mean=1.0, std=1.0))
    (file,) = (tmp_path / "cache" / "scales").iterdir()
    other = tmp_path / "other.json"
    other.write_text("mine")
    file.unlink()
    file.symlink_to(other)
    store.put(model, reward, Scale(mean=2.0, std=1.0))
    assert other.read_text() == "mine"
    assert store.get(model, reward) == Scale(mean=2.0, std=1.0)
