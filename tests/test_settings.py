"""Settings: one set of options as arguments, in the environment and in YAML; and imports run downward."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import faces
import pytest
from pydantic import ValidationError

from cards_integrations import CardsLLM, CardsSettings, ChatCards
from cards_integrations.cli.options import options_from
from cards_integrations.cli.serve import allowed_rewards
from cards_integrations.decoding import Cards, FixedLength, Punctuation, Sampling, Uncertainty
from cards_integrations.engine import EngineSettings
from cards_integrations.errors import ModelError, SettingsError
from cards_integrations.langchain import CardsCompletion
from cards_integrations.models.local.resolve import resolve_model
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards import (
    NAMED,
    ClassifierReward,
    FunctionReward,
    GateReward,
    GroundednessReward,
    JudgeReward,
    RelevanceReward,
    RemoteReward,
    WeightedReward,
)
from cards_integrations.server import ServerSettings

CLASSIFIER = ClassifierReward(
    model="some/reward", label="good", output="log_odds", prompt_format="{prompt}|{response}", scale=(0.5, 2.0)
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoding": "sampling"},
        {"decoding": Sampling(chunk=3), "reward": None},
        {"decoding": Cards.paper(target_reward=8.5)},
        {"decoding": Cards(boundary=Uncertainty(measure="evidential", threshold=0.2, min_length=2, max_length=9))},
        {"decoding": Cards(boundary=FixedLength(length=7), acceptance="hard")},
        {"decoding": Cards(boundary=Punctuation(marks=(".", "\n")), target_reward=-1.5, beta=0.25)},
        {"reward": CLASSIFIER},
        {"reward": "sentiment-minilm"},
        {"model": LocalModel(model="some/model", revision="main", adapter="some/adapter")},
        {"stop": ["\n\n", "Ünde: \t"], "seed": 2**63, "temperature": 0.0, "top_k": 0, "timeout": 1.5},
        {"engine": EngineSettings(width=3, device="cpu", dtype="float32", max_rows=2)},
    ],
)
def test_yaml_gives_back_every_setting(options, tmp_path):
    settings = CardsSettings(**options)
    file = tmp_path / "cards.yaml"
    file.write_text(settings.to_yaml(), encoding="utf-8")
    assert CardsSettings.from_yaml(file) == settings
    assert CardsLLM.from_settings(file).options() == settings.options()
    assert CardsSettings(**json.loads(settings.model_dump_json())) == settings


def test_a_yaml_file_of_names_is_enough(tmp_path):
    file = tmp_path / "cards.yaml"
    file.write_text("model: some/model\nreward: sentiment\ndecoding:\n  method: cards\n  alpha: 0.2\nstop: END\n")
    settings = CardsSettings.from_yaml(file)
    assert settings.model == LocalModel(model="some/model")
    assert settings.reward == NAMED["sentiment"]
    assert settings.decoding == Cards(alpha=0.2)
    assert settings.stop == ("END",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a list", "mapping"),
        ("model: [", "cannot be read"),
        ("max_token: 3", "Did you mean 'max_tokens'"),
        ("5: 3", "'5'"),
        ("decoding: {method: card}", "Did you mean 'cards'"),
        ("decoding: {method: cards, alfa: 1}", "alfa"),
        ("reward: {kind: clasifier, model: m}", "Did you mean 'classifier'"),
    ],
)
def test_a_bad_yaml_file_says_what_is_wrong(text, says, tmp_path):
    file = tmp_path / "cards.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=says):
        CardsSettings.from_yaml(file)


def test_a_missing_yaml_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.yaml"):
        CardsLLM.from_settings(tmp_path / "nowhere.yaml")


def test_a_function_has_no_yaml():
    with pytest.raises(SettingsError, match="reward"):
        CardsSettings(reward=lambda prompt, texts: [0.0 for _ in texts]).to_yaml()


@pytest.mark.parametrize("face", [CardsSettings, CardsLLM, ChatCards])
def test_the_environment_gives_defaults(face, monkeypatch):
    for name, value in {
        "CARDS_MODEL": "some/model",
        "CARDS_REWARD": "sentiment-minilm",
        "CARDS_DECODING": '{"method": "cards", "target_reward": 1.25, "boundary": {"kind": "fixed_length"}}',
        "CARDS_MAX_TOKENS": "33",
        "CARDS_TEMPERATURE": "0.25",
        "CARDS_STOP": '["END"]',
        "CARDS_ENGINE__WIDTH": "3",
        "CARDS_ENGINE__DEVICE": "cpu",
    }.items():
        monkeypatch.setenv(name, value)
    found = face(max_tokens=34)
    assert found.model == LocalModel(model="some/model")
    assert found.reward == NAMED["sentiment-minilm"]
    assert found.decoding == Cards(target_reward=1.25, boundary=FixedLength())
    assert found.max_tokens == 34  # an argument goes before the environment
    assert (found.temperature, found.stop) == (0.25, ("END",))
    assert found.engine == EngineSettings(width=3, device="cpu")


@pytest.mark.parametrize("face", [CardsSettings, CardsLLM, ChatCards])
def test_the_environment_takes_names_and_json(face, monkeypatch):
    monkeypatch.setenv("CARDS_DECODING", "sampling")
    monkeypatch.setenv("CARDS_MODEL", '{"model": "some/model", "revision": "v2"}')
    monkeypatch.setenv("CARDS_REWARD", CLASSIFIER.model_dump_json())
    found = face()
    assert found.decoding == Sampling()
    assert found.model == LocalModel(model="some/model", revision="v2")
    assert found.reward == CLASSIFIER


def test_a_bad_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("CARDS_MAX_TOKENS", "many")
    with pytest.raises(SettingsError, match="max_tokens"):
        CardsLLM()


def test_settings_are_frozen():
    for settings, name in [
        (CardsSettings(), "max_tokens"),
        (Cards(), "alpha"),
        (Uncertainty(), "threshold"),
        (CLASSIFIER, "model"),
        (LocalModel(), "model"),
        (EngineSettings(), "width"),
    ]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(settings, name, getattr(settings, name))


def test_settings_take_no_unknown_names():
    kinds: list[Any] = [Cards, Sampling, Uncertainty, FixedLength, Punctuation, LocalModel, EngineSettings]
    for kind in kinds:
        with pytest.raises(SettingsError, match="nonsense"):
            kind(nonsense=1)
    faces: list[Any] = [CardsSettings, CardsLLM, ChatCards]
    for face in faces:
        with pytest.raises(SettingsError, match="Did you mean 'temperature'"):
            face(temprature=1)


def test_settings_have_a_json_schema():
    schema = CardsSettings.model_json_schema()
    assert set(schema["properties"]) == set(CardsSettings.model_fields)
    assert schema["properties"]["max_tokens"]["minimum"] == 1
    for kind in (Cards, Sampling, ClassifierReward):
        assert kind.model_json_schema()["additionalProperties"] is False


def test_a_callable_is_a_reward():
    assert CardsSettings(reward=max).reward == FunctionReward(function=max)


def test_equal_settings_are_equal_and_hashable():
    assert CardsSettings(**faces.options()) == CardsSettings(**faces.options())
    assert len({Cards(), Cards(), CLASSIFIER, CLASSIFIER.model_copy(), EngineSettings(), EngineSettings()}) == 3


CORE = ["settings", "engine.engine", "decoding", "rewards", "models.local.language_model", "trace"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import cards_integrations", ["torch", "transformers", "langchain_core", "llama_index"]),
        (";".join(f"import cards_integrations.{name}" for name in CORE), ["langchain_core", "llama_index"]),
    ],
)
def test_imports_are_light_and_run_downward(code, absent):
    print_modules = "import sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    ran = subprocess.run([sys.executable, "-c", f"{code}\n{print_modules}"], capture_output=True, text=True, check=True)
    loaded = set(json.loads(ran.stdout))
    assert "cards_integrations" in loaded
    assert not loaded & set(absent)


def test_what_is_given_replaces_what_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CARDS_REWARD__KIND", "length")
    monkeypatch.setenv("CARDS_REWARD__TARGET", "40")
    monkeypatch.setenv("CARDS_MAX_TOKENS", "9")
    reward = CardsSettings().reward
    assert reward is not None
    assert reward.kind == "length"
    file = tmp_path / "cards.yaml"
    file.write_text("reward: {kind: classifier, model: some/reward}")
    given = {"kind": "classifier", "model": "some/reward"}
    for settings in (CardsSettings(reward=given), CardsSettings.from_yaml(file), CardsLLM(reward=given)):
        assert (settings.reward, settings.max_tokens) == (ClassifierReward(model="some/reward"), 9)


@pytest.mark.parametrize("measure", ["max_probability", "evidential"])
def test_a_threshold_that_is_never_reached_is_refused(measure):
    with pytest.raises(SettingsError, match="never reached"):
        Uncertainty(measure=measure)
    assert Uncertainty(measure=measure, threshold=0.7).threshold == 0.7


def test_a_variable_that_is_no_json_is_named(monkeypatch):
    monkeypatch.setenv("CARDS_ENGINE", "x")
    with pytest.raises(SettingsError, match=r'cannot be read: .*"engine"'):
        CardsSettings()
    with pytest.raises(SettingsError, match=r'cannot be read: .*"engine"'):
        CardsLLM()


NEAR: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a kind of a part": (lambda: WeightedReward(rewards=[{"kind": "lenght"}]), "rewards.0: ", "length"),
    "a setting of a reward": (lambda: ClassifierReward(**{"modle": "m"}), "modle: ", "model"),
    "a setting of a part": (
        lambda: CardsLLM(reward={"kind": "min", "rewards": ["sentiment", {"kind": "length", "taget": 3}]}),
        "reward.rewards.1.taget: ", "target",
    ),
    "a gate": (lambda: GateReward(gate="sentimnt", reward="sentiment"), "gate: ", "sentiment"),
    "a setting of a method": (lambda: CardsLLM(decoding={"method": "cards", "betta": 1}), "decoding.betta: ", "beta"),
    "a boundary": (lambda: Cards(boundary={"kind": "uncertanty"}), "boundary='uncertanty': ", "uncertainty"),
    "a boundary by name": (lambda: Cards(boundary="punctuaton"), "boundary='punctuaton': ", "punctuation"),
    "a setting of a boundary": (
        lambda: CardsSettings(decoding={"method": "cards", "boundary": {"kind": "uncertainty", "treshold": 1}}),
        "decoding.boundary.uncertainty.treshold: ", "threshold",
    ),
    "a measure": (lambda: Uncertainty(measure="entopy"), "measure='entopy': ", "entropy"),
    "a setting of the engine": (lambda: ChatCards(engine={"widht": 4}), "engine.widht: ", "width"),
    "a setting of a model": (lambda: CardsCompletion(model={"modle": "m"}), "model.modle: ", "model"),
    "a setting of the engine, of a model": (
        lambda: LocalModel(**{"dtyp": "float32"}), "dtyp: ", "engine=EngineSettings(dtype=...) of the LLM",
    ),
    "a setting of the engine, of the LLM": (
        lambda: CardsLLM(**{"devise": "cpu"}), "The setting 'devise'", "engine=EngineSettings(device=...)",
    ),
    "a setting of the method, of the LLM": (
        lambda: ChatCards(**{"target_rewrd": 1}), "The setting 'target_rewrd'", "decoding=Cards(target_reward=...)",
    ),
    "a setting of a boundary, of a method": (
        lambda: CardsLLM(decoding={"method": "cards", "treshold": 3}), "decoding.treshold: ",
        "boundary=Uncertainty(threshold=...)",
    ),
    "an option": (lambda: CardsLLM(**{"tempratur": 1}), "The setting 'tempratur'", "temperature"),
}  # fmt: skip


@pytest.mark.parametrize("what", NEAR)
def test_a_typing_error_is_told_in_one_line_with_its_path_and_the_nearest_name(what):
    wrong, path, near = NEAR[what]
    with pytest.raises(SettingsError) as caught:
        wrong()
    said = str(caught.value)
    assert said.startswith(path)
    assert re.search(rf"Did you mean '?{re.escape(near)}'?", said)
    assert "\n" not in said
    assert ";" not in said  # nothing that follows from it, such as a setting that is missing


def test_the_path_is_told_by_yaml_and_by_a_call_as_well(tmp_path):
    file, wrong = tmp_path / "cards.yaml", {"method": "best_of_n", "nn": 2}
    file.write_text(json.dumps({"decoding": wrong}))
    for read in (lambda: CardsSettings.from_yaml(file), lambda: CardsLLM().align("Hello", decoding=wrong)):
        with pytest.raises(SettingsError, match=r"^decoding\.nn: BestOfN has no such setting. Did you mean 'n'"):
            read()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: CardsLLM(engine="cpu"), "engine='cpu': pass EngineSettings or a mapping of its settings."),
        (lambda: Cards(boundary=5), "boundary=5: pass a settings object or a mapping of its settings."),
        (lambda: EngineSettings(threads="lots"), r"threads='lots': Input .*; or: Input should be 'auto'"),
        (lambda: Cards(target_reward="high"), r"target_reward='high': Input .*; or: Input should be 'auto'"),
    ],
)
def test_a_value_of_another_type_is_told_once(wrong, said):
    with pytest.raises(SettingsError, match=f"^{said}$"):
        wrong()


@pytest.mark.parametrize("arity", [1, 3])
def test_a_reward_function_that_takes_other_arguments_is_refused_when_it_is_given(arity):
    def one(answers):
        return [0.0 for _ in answers]

    def three(prompt, answers, more):
        return [0.0 for _ in answers]

    function = one if arity == 1 else three
    said = rf"reward 'function {function.__name__}' is called with \(prompt, answers\), .*; but it takes \("
    with pytest.raises(SettingsError, match=said) as caught:
        CardsLLM(reward=function)
    assert "\n" not in str(caught.value)


def test_a_boundary_is_known_by_its_name():
    settings = CardsSettings(decoding={"method": "cards", "boundary": "punctuation"})
    assert settings.decoding == Cards(boundary=Punctuation())


def test_a_variable_that_is_almost_one_is_told_once(monkeypatch, caplog):
    monkeypatch.setenv("CARDS_MAX_TOKEN", "5")
    monkeypatch.setenv("CARDS_ENGIN__THREADS", "1")
    monkeypatch.setenv("CARDS_QQ", "5")
    monkeypatch.setenv("CARDS_PROGRESS", "1")
    for _ in range(2):
        assert CardsSettings().max_tokens == CardsLLM().max_tokens == 128
    told = sorted(record.getMessage() for record in caplog.records)
    assert len(told) == 2
    assert re.match(r"The environment variable CARDS_ENGIN is not known .*CARDS_ENGINE", told[0])
    assert re.match(r"The environment variable CARDS_MAX_TOKEN is not known .*CARDS_MAX_TOKENS", told[1])


def test_several_mistakes_are_all_told():
    with pytest.raises(SettingsError, match=r"^max_tokens=0: .*; top_p=9: ") as caught:
        CardsSettings(max_tokens=0, top_p=9)
    assert [problem.where for problem in caught.value.problems] == [("max_tokens",), ("top_p",)]


def test_a_kind_whose_settings_have_defaults_is_a_name_everywhere(tmp_path, monkeypatch):
    file = tmp_path / "cards.yaml"
    file.write_text("reward: {kind: gate, gate: groundedness, reward: relevance}\n")
    gate = GateReward(gate=GroundednessReward(), reward=RelevanceReward())
    assert CardsSettings.from_yaml(file).reward == gate
    assert CardsLLM(reward="relevance").reward == RelevanceReward()
    assert CardsLLM().request("Hello", {"reward": "judge"}).reward == JudgeReward()
    assert options_from(None, False, reward="relevance") == {"reward": "relevance"}
    assert ServerSettings(**allowed_rewards(["relevance"])).rewards["relevance"] == RelevanceReward()
    monkeypatch.setenv("CARDS_REWARD", "relevance")
    assert CardsSettings().reward == RelevanceReward()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("length", r"reward='length' needs settings: pass LengthReward\(target=...\)"),
        ("pattern", "give wanted="),
        ("relevanse", "Did you mean 'relevance'"),
    ],
)
def test_a_kind_that_needs_settings_says_which(name, says):
    with pytest.raises(SettingsError, match=says):
        CardsSettings(reward=name)


def by_position(cls: Any, value: Any) -> Any:
    return cls(value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            lambda: by_position(CardsLLM, "smollm2"),
            r"^CardsLLM takes its settings by name, such as CardsLLM\(model='s",
        ),
        (lambda: by_position(ClassifierReward, "a/b"), r"such as ClassifierReward\(model='a/b'\)"),
        (lambda: by_position(Cards, 1.5), r"such as Cards\(target_reward=1.5\)"),
        (lambda: by_position(RemoteReward, "key"), r"such as RemoteReward\(url=\.\.\.\)"),  # it may hold a key
        (lambda: CardsLLM(decoding=Cards), r"^decoding=Cards is a class: pass an object of it, Cards\(\)"),
        (lambda: CardsLLM(model=LocalModel), r"^model=LocalModel is a class"),
        (lambda: CardsLLM(model=3), "^model=3: pass a name, a hub id"),
    ],
)
def test_a_value_of_the_wrong_form_says_what_to_write(wrong, says):
    with pytest.raises(SettingsError, match=says):
        wrong()


def test_a_path_that_is_not_there_says_what_is_beside_it(tmp_path, monkeypatch):
    (tmp_path / "tiny_lm").mkdir()
    (tmp_path / "cards.yaml").write_text("max_tokens: 3")
    (tmp_path / "tiny_ln.txt").write_text("no model")
    monkeypatch.chdir(tmp_path)
    for wrong in ("./tiny_lmm", str(tmp_path / "tiny_lmm")):
        with pytest.raises(ModelError, match=r"no such file or directory .* Did you mean 'tiny_lm'\?$"):
            resolve_model(wrong)
    with pytest.raises(SettingsError, match=r"Did you mean '\./tiny_lm'\?"):
        resolve_model("tiny_lmm")
    with pytest.raises(ModelError, match=r"is there\)\.$"):
        resolve_model("./tiny_lmm/further/down")
    with pytest.raises(SettingsError, match=r"No such file or directory\. Did you mean 'cards\.yaml'\?"):
        CardsSettings.from_yaml("card.yaml")
