"""Settings of rewards are plain data: whatever the kind, they come back from JSON, YAML and the environment."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cards_integrations import CardsLLM, CardsSettings
from cards_integrations.errors import CardsError, SettingsError
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards import (
    REWARDS,
    ClassifierReward,
    Conversation,
    CritiqueJudgeReward,
    FluencyReward,
    FunctionReward,
    GateReward,
    GradedJudgeReward,
    GroundednessReward,
    GuardedReward,
    ImplicitReward,
    JudgeReward,
    LengthReward,
    MinReward,
    PatternReward,
    ProcessReward,
    RelevanceReward,
    RemoteReward,
    Response,
    Reward,
    RewardLoader,
    ValueReward,
    WeightedReward,
    as_reward,
)
from cards_integrations.rewards.criterion import Criterion
from cards_integrations.rewards.function import imports_allowed
from cards_integrations.trace import Usage

TYPED = CardsError
URL = "https://example.org:8000/x"


def words(prompt: str, texts: list[str]) -> list[float]:
    return [float(len(text.split())) for text in texts]


def letters(prompt: str, texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]


class Holder:
    def method(self, prompt: str, texts: list[str]) -> list[float]:
        return [0.0] * len(texts)

    __call__ = method


# --- any settings at all ---

number = st.floats(-1e6, 1e6)
texts = ["", "a/b", "null", "3", "true", "{x}", " - : #", "\t\n\r", "é日😀", "\u2028\x85\ufeff", "'\"\\", "{prompt}"]
text = st.sampled_from(texts)
name = st.sampled_from(texts[1:])
maybe = st.none() | name
common = {
    "scale": st.none() | st.tuples(number, st.floats(0, 1e6)),
    "granularity": st.sampled_from(["token", "sentence"]),
    "timeout": st.none() | st.floats(1e-3, 1e6),
}


def some(kind: type[Reward], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Reward]:
    return st.builds(kind, **common, **fields)


model = st.builds(LocalModel, model=name, revision=maybe, adapter=maybe, trust_remote_code=st.booleans())
formats = st.builds("{}{{response}}{}".format, text, text)
expressions = st.lists(st.sampled_from(["a+", r"\bcat\b", "(?i)x|y", "[0-9]{2}", "é", "\n"]), min_size=1, max_size=2)
label = st.none() | st.integers(0, 9) | name


def implicit(first: LocalModel, **others: Any) -> ImplicitReward:
    return ImplicitReward(tuned=first, base=None, **others)


def judge(before: str, yes: str, **others: Any) -> JudgeReward:
    return JudgeReward(rubric=before + "{prompt} {response}", words=(yes, yes + "!"), **others)


criteria = st.lists(st.builds(Criterion, question=name, weight=st.floats(0.1, 9)), max_size=1)
grades = st.sampled_from([("bad", "good"), {"A": 1.0, "B": -2.5}])
LEAVES: dict[str, st.SearchStrategy[Reward]] = {
    "critique_judge": some(
        CritiqueJudgeReward, model=st.none() | model, criteria=criteria, grades=grades, verdict=name,
        critiques=st.integers(1, 9), temperature=st.floats(0.1, 9), seed=st.integers(0, 9),
    ),
    "graded_judge": some(GradedJudgeReward, model=st.none() | model, criteria=criteria, grades=grades),
    "process": some(
        ProcessReward, model=name, revision=maybe, separator=st.none() | name, step_tag=name, after_tag=text,
        words=st.none() | st.just(("+", "-")), aggregate=st.sampled_from(["last", "min", "product", "mean"]),
        prompt_format=st.none() | st.just("chat") | formats,
    ),
    "classifier": some(
        ClassifierReward, model=name, revision=maybe, adapter=maybe, trust_remote_code=st.booleans(), label=label,
        output=st.sampled_from(["logit", "probability", "log_odds"]), end_of_turn=st.booleans(),
        prompt_format=st.none() | st.just("chat") | formats,
    )
    | some(ClassifierReward, model=name, weights=st.dictionaries(name | st.integers(0, 9), number, min_size=1)),
    "function": some(FunctionReward, function=st.sampled_from([words, letters])),
    "fluency": some(FluencyReward, n=st.integers(1, 99), least_log_p=st.none() | number),
    "length": some(LengthReward, target=st.integers(1, 10**9), unit=st.sampled_from(["words", "characters"])),
    "pattern": some(PatternReward, wanted=expressions, forbidden=expressions, case_sensitive=st.booleans()),
    "judge": st.builds(judge, text, name, model=st.none() | model, **common),
    "implicit": st.builds(implicit, model, beta=st.floats(1e-3, 1e3), **common),
    "relevance": some(RelevanceReward, model=name, revision=maybe),
    "value": some(ValueReward, path=name),
    "groundedness": some(GroundednessReward, patterns=st.just(("(?P<context>.+)é",)))
    | some(GroundednessReward, by=st.sampled_from(["entailment", "embedding"]), model=name, label=name),
    "remote": some(
        RemoteReward, url=st.just(URL), protocol=st.sampled_from(["score", "json", "systemone"]),
        model=maybe, prompt_format=formats, retries=st.integers(0, 9), batch_size=st.integers(1, 99),
        request_timeout=st.floats(1e-3, 1e6),
    ),
}  # fmt: skip


def weighted(rewards: list[Reward], weights: list[float], **others: Any) -> WeightedReward:
    weights = weights[: len(rewards)]
    return WeightedReward(rewards=rewards, weights=weights if any(weights) else (), **others)


def composites(part: st.SearchStrategy[Reward]) -> dict[str, st.SearchStrategy[Reward]]:
    parts = st.lists(part, min_size=1, max_size=2)
    return {
        "weighted": st.builds(weighted, parts, st.lists(number, min_size=2, max_size=2), **common),
        "min": some(MinReward, rewards=parts),
        "guarded": some(GuardedReward, reward=part, guard=part, weight=st.floats(1e-3, 1e3)),
        "gate": some(GateReward, gate=part, reward=part, threshold=number, closed=number),
    }


leaf = st.one_of(*LEAVES.values())
nested = leaf | st.one_of(*composites(leaf).values())
KINDS = {**LEAVES, **composites(nested)}
every_kind = pytest.mark.parametrize("kind", sorted(REWARDS))
few = settings(max_examples=10)


def test_every_kind_is_tried() -> None:
    assert set(KINDS) == set(REWARDS)


def assert_same(found: Reward | None, expected: Reward | None) -> None:
    assert found == expected
    assert hash(found) == hash(expected)
    assert type(found) is type(expected)


@every_kind
@few
@given(data=st.data())
def test_settings_come_back_from_json(kind: str, data: st.DataObject) -> None:
    reward = data.draw(KINDS[kind])
    with imports_allowed():
        assert_same(as_reward(reward.model_dump(mode="json")), reward)
        assert_same(as_reward(reward.model_dump_json()), reward)
        assert_same(as_reward(json.dumps(reward.model_dump(mode="json"))), reward)


@every_kind
@few
@given(data=st.data())
def test_settings_come_back_from_yaml(kind: str, data: st.DataObject) -> None:
    chosen = CardsSettings(reward=data.draw(KINDS[kind]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cards.yaml"
        file.write_text(chosen.to_yaml(), encoding="utf-8")
        found = CardsSettings.from_yaml(file, allow_imports=True)
    assert found == chosen
    assert_same(found.reward, chosen.reward)


@every_kind
@few
@given(data=st.data())
def test_settings_come_back_from_the_environment(kind: str, data: st.DataObject) -> None:
    reward = data.draw(KINDS[kind])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARDS_REWARD", reward.model_dump_json())
        patch.setenv("CARDS_ALLOW_IMPORTS", "1")
        assert_same(CardsSettings().reward, reward)


@every_kind
@few
@given(data=st.data())
def test_settings_fit_the_schema_of_their_kind(kind: str, data: st.DataObject) -> None:
    schema = REWARDS[kind].model_json_schema()
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    dump = data.draw(KINDS[kind]).model_dump(mode="json")
    validator.validate(dump)
    assert not validator.is_valid({**dump, "nonsense": 1})
    assert not validator.is_valid({**dump, "kind": "another"})


@every_kind
def test_the_schema_of_all_settings_takes_every_kind(kind: str) -> None:
    validator = jsonschema.Draft202012Validator(CardsSettings.model_json_schema()["properties"]["reward"])
    assert validator.is_valid({"kind": kind})
    assert not validator.is_valid({"model": "no kind"})
    assert not validator.is_valid(3)


def test_equal_settings_have_one_hash_however_they_were_written() -> None:
    made = WeightedReward(rewards=["sentiment", LengthReward(target=3, scale=(0, 1))], weights=(1, 2))
    read = as_reward(
        {
            "kind": "weighted",
            "rewards": ["sentiment", {"kind": "length", "target": 3.0, "scale": [0.0, 1.0]}],
            "weights": [1.0, 2.0],
        }
    )
    assert_same(read, made)
    assert read != as_reward({**made.model_dump(mode="json"), "weights": [2, 1]})


REMOTE = RemoteReward(url=URL, protocol="score")


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (REMOTE, RemoteReward(url=URL, protocol="score", request_timeout=30.0)),
        (LengthReward(target=3, scale=(0.0, 1.0)), LengthReward(target=3, scale=(-0.0, 1.0))),
    ],
    ids=["30 and 30.0", "0.0 and -0.0"],
)
def test_equal_numbers_have_one_hash(one: Reward, same: Reward) -> None:
    assert_same(one, same)


async def test_a_used_pattern_is_still_equal_to_a_fresh_one() -> None:
    used, fresh = PatternReward(wanted="a"), PatternReward(wanted="a")
    model, talk = RewardLoader(None)[used], Conversation("x", Usage())  # type: ignore[arg-type]
    model.open(talk)
    assert await model.score([Response(talk, "a")]) == [1]
    assert_same(used, fresh)
    assert as_reward(used.model_dump(mode="json")) == fresh


# --- functions ---


@contextmanager
def yaml_file(text: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cards.yaml"
        file.write_text(text, encoding="utf-8")
        yield file


@pytest.mark.parametrize(
    "wrap",
    [lambda r: r, lambda r: WeightedReward(rewards=[r]), lambda r: GateReward(gate=r, reward=r)],
)
def test_a_function_is_imported_only_where_that_is_allowed(
    wrap: Callable[[Reward], Reward], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = wrap(FunctionReward(function=words))
    dump = CardsSettings(reward=reward).to_yaml()
    assert f"{__name__}.words" in dump
    with yaml_file(dump) as file:
        for read in (CardsSettings.from_yaml, CardsLLM.from_settings):
            with pytest.raises(TYPED, match=r"allow_imports=True.*CARDS_ALLOW_IMPORTS=1"):
                read(file)
            assert read(file, allow_imports=True).reward == reward
        with pytest.raises(TYPED, match="allow_imports=True"):  # the permission has ended with the call
            as_reward(reward.model_dump(mode="json"))
        monkeypatch.setenv("CARDS_ALLOW_IMPORTS", "0")
        with pytest.raises(TYPED, match="allow_imports=True"):
            CardsSettings.from_yaml(file)
        monkeypatch.setenv("CARDS_ALLOW_IMPORTS", "1")
        assert CardsSettings.from_yaml(file).reward == reward


def test_code_that_may_not_be_imported_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_bad_module.py").write_text(f"open({str(tmp_path / 'was-here')!r}, 'w')\ndef score(p, t): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    named = {"kind": "function", "function": "a_bad_module.score"}
    with pytest.raises(TYPED, match="a_bad_module"):
        as_reward(named)
    assert not (tmp_path / "was-here").exists()
    with imports_allowed():
        as_reward(named)
    assert (tmp_path / "was-here").exists()


def test_a_function_that_is_not_there_is_named() -> None:
    with imports_allowed(), pytest.raises(TYPED, match="no_such_function"):
        as_reward({"kind": "function", "function": f"{__name__}.no_such_function"})


def local() -> Callable[..., Any]:
    def inner(prompt: str, texts: list[str]) -> list[float]:
        return [0.0] * len(texts)

    return inner


@pytest.mark.parametrize("function", [lambda prompt, texts: [0.0], local(), Holder().method, Holder()])
def test_a_function_without_a_name_has_no_yaml(function: Callable[..., Any]) -> None:
    for reward in (function, WeightedReward(rewards=[function]), GateReward(gate="sentiment", reward=function)):
        with pytest.raises(SettingsError, match="cannot be written as YAML"):
            CardsSettings(reward=reward).to_yaml()


# --- what is wrong ---

LENGTH = {"kind": "length", "target": 3}
BAD: dict[str, tuple[Any, str]] = {
    "weights all zero": ({"kind": "weighted", "rewards": [LENGTH, LENGTH], "weights": [0, -0.0]}, "weights are zero"),
    "too few weights": ({"kind": "weighted", "rewards": [LENGTH, LENGTH], "weights": [1]}, "1 weights for 2 rewards"),
    "too many weights": ({"kind": "weighted", "rewards": [LENGTH], "weights": [1, 2]}, "2 weights for 1 rewards"),
    "weight nan": ({"kind": "weighted", "rewards": [LENGTH], "weights": [float("nan")]}, r"weights\.0.*\n?.*finite"),
    "weight inf": ({"kind": "weighted", "rewards": [LENGTH], "weights": [float("inf")]}, r"weights\.0.*\n?.*finite"),
    "no rewards": ({"kind": "weighted", "rewards": []}, "rewards"),
    "rewards left out": ({"kind": "min"}, "rewards"),
    "no rewards in min": ({"kind": "min", "rewards": []}, "rewards"),
    "rewards a string": ({"kind": "min", "rewards": "sentiment"}, "rewards"),
    "a part of no kind": ({"kind": "min", "rewards": [{"target": 3}]}, "names no kind"),
    "a part of an unknown kind": ({"kind": "min", "rewards": [{"kind": "lenght"}]}, "Did you mean 'length'"),
    "an unknown kind": ({"kind": "wieghted"}, "Did you mean 'weighted'"),
    "a kind that is a list": ({"kind": ["length"]}, "not known"),
    "gate without reward": ({"kind": "gate", "gate": LENGTH}, "reward"),
    "threshold nan": ({"kind": "gate", "gate": LENGTH, "reward": LENGTH, "threshold": float("nan")}, "threshold"),
    "weight of a guard zero": ({"kind": "guarded", "reward": LENGTH, "weight": 0}, "weight"),
    "n-grams of nothing": ({"kind": "fluency", "n": 0}, "n"),
    "closed infinite": ({"kind": "gate", "gate": LENGTH, "reward": LENGTH, "closed": float("-inf")}, "closed"),
    "an unknown field": ({**LENGTH, "tmeout": 3}, "tmeout"),
    "timeout negative": ({**LENGTH, "timeout": -1}, "timeout"),
    "timeout zero": ({**LENGTH, "timeout": 0}, "timeout"),
    "timeout nan": ({**LENGTH, "timeout": float("nan")}, "timeout"),
    "granularity": ({**LENGTH, "granularity": "word"}, "granularity"),
    "scale of one number": ({**LENGTH, "scale": [1]}, "scale"),
    "scale nan": ({**LENGTH, "scale": [float("nan"), 1]}, "scale"),
    "spread negative": ({**LENGTH, "scale": [0, -1]}, "scale"),
    "length zero": ({"kind": "length", "target": 0}, "target"),
    "expression": ({"kind": "pattern", "wanted": ["a", "("]}, r"'\(' is not a regular expression"),
    "forbidden expression": ({"kind": "pattern", "forbidden": "[z-a]"}, "is not a regular expression"),
    "expression a number": ({"kind": "pattern", "wanted": [3]}, "is not a regular expression"),
    "no expression": ({"kind": "pattern"}, "wanted"),
    "rubric": ({"kind": "judge", "rubric": "Is it good?"}, "rubric"),
    "one word twice": ({"kind": "judge", "words": ["Yes", "Yes"]}, "words"),
    "implicit of one model": ({"kind": "implicit"}, "same model"),
    "beta zero": ({"kind": "implicit", "tuned": "a/b", "beta": 0}, "beta"),
    "no entailment model": ({"kind": "groundedness", "by": "entailment"}, "model"),
    "prompt_format": ({"kind": "classifier", "model": "a/b", "prompt_format": "{prompt}"}, "prompt_format"),
    "group of the context": ({"kind": "groundedness", "patterns": ["(.+)"]}, "context"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "says"), BAD.values(), ids=BAD)
def test_bad_settings_are_refused_by_name(value: Any, says: str) -> None:
    with pytest.raises(TYPED, match=says):
        as_reward(value)
    with pytest.raises(TYPED, match=says):
        CardsSettings(reward=value)
    with yaml_file(yaml.safe_dump({"reward": value})) as file, pytest.raises(TYPED, match=says):
        CardsSettings.from_yaml(file)
    with pytest.raises(SettingsError, match="reward"):  # of a call
        CardsSettings().request("Hello", {"reward": value})


@pytest.mark.parametrize(
    "cycle",
    [
        "&a {kind: weighted, rewards: [*a]}",
        "&a {kind: min, rewards: [sentiment, *a]}",
        "&a {kind: gate, gate: sentiment, reward: *a}",
        "{kind: weighted, rewards: &a [{kind: min, rewards: *a}]}",
    ],
)
def test_a_reward_that_is_a_part_of_itself_is_refused(cycle: str) -> None:
    with yaml_file(f"reward: {cycle}") as file, pytest.raises(TYPED):
        CardsSettings.from_yaml(file)


@pytest.mark.parametrize("expression", ["a{99999999999999999999}", "(" * 5000 + ")" * 5000], ids=["count", "depth"])
def test_an_expression_beyond_what_re_can_compile_is_refused(expression: str) -> None:
    with pytest.raises(TYPED, match="not a regular expression"):
        PatternReward(wanted=expression)


@pytest.mark.parametrize("expression", ["(?P<context>.+", 3])
def test_a_bad_expression_for_the_context_is_refused(expression: Any) -> None:
    with pytest.raises(TYPED, match="regular expression"):
        GroundednessReward(patterns=[expression])


@pytest.mark.parametrize("text", ['{"kind": "length", "target": 3', "{", "{'kind': 'length'}"])
def test_broken_json_is_refused_by_name(text: str) -> None:
    with pytest.raises(SettingsError, match="reward"):
        as_reward(text)


def test_json_too_deep_to_read_is_refused() -> None:
    depth = 3000
    text = '{"kind": "min", "rewards": [' * depth + json.dumps(LENGTH) + "]}" * depth
    with pytest.raises(TYPED):
        as_reward(text)


def test_an_infinite_timeout_comes_back_or_is_refused() -> None:
    try:
        reward = LengthReward(target=3, timeout=float("inf"))
    except SettingsError:
        return
    assert as_reward(reward.model_dump_json()) == reward
