"""Rewards of one's own: a plug-in, a notebook's cell, or just an object (`test_outside.py` installs one)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import plugins
import pytest
from conftest import Start

from cards_integrations.decoding import Cards, FixedLength
from cards_integrations.engine import Request
from cards_integrations.errors import SettingsError
from cards_integrations.rewards import REWARDS, LengthReward, Reward, as_reward, register_reward
from cards_integrations.settings import CardsSettings

DECODING = Cards(target_reward=-3.0, beta=0.5, max_rejections=3, boundary=FixedLength(length=4))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a test registers is forgotten."""
    before = dict(REWARDS)
    yield
    REWARDS.clear()
    REWARDS.update(before)


# --- plug-ins ---


def test_without_the_plug_in_its_kind_is_not_known() -> None:
    with pytest.raises(SettingsError, match=r"reward\.kind 'brevity' is not known.*Known: classifier, .*function"):
        as_reward({"kind": "brevity"})


@pytest.fixture
def plug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`plug(kind, code)` puts a distribution with one reward on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    return lambda kind, code: plugins.leave(tmp_path, "rewards", kind, code)


WORKING = """
from typing import Literal
from cards_integrations.rewards import Reward, register_reward

@register_reward
class Mine(Reward):
    kind: Literal["working"] = "working"
"""


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [
        ("unbound", "import a_module_that_is_not_here", "does not load: No module named 'a_module_that_is_not_here'"),
        ("syntax", "class Mine(:", "does not load: invalid syntax"),
        ("raising", "raise RuntimeError('the licence has expired')", "does not load: the licence has expired"),
        ("absent", "Yours = 1", "does not load: module .* has no attribute 'Mine'"),
        ("number", "Mine = 3", "is not a subclass of Reward"),
        ("foreign", "class Mine: ...", "is not a subclass of Reward"),
        ("instance", WORKING + "Mine = Mine()", "is not a subclass of Reward"),
    ],
)
def test_a_broken_plug_in_is_named(plug: Callable[[str, str], None], kind: str, code: str, says: str) -> None:
    plug(kind, code)
    with pytest.raises(SettingsError, match=rf"plug-in '{kind}' \(cards_plugin_{kind}:Mine\) {says}"):
        as_reward({"kind": kind})
    with pytest.raises(ValueError, match=rf"plug-in '{kind}'"):
        CardsSettings(reward={"kind": kind})
    assert as_reward({"kind": "length", "target": 3}) == LengthReward(target=3)  # the others still work


def test_a_plug_in_may_register_itself(plug: Callable[[str, str], None]) -> None:
    plug("working", WORKING)
    found = as_reward({"kind": "working"})
    assert (type(found).__module__, type(found).__name__) == ("cards_plugin_working", "Mine")
    assert REWARDS["working"] is type(found)


def test_a_plug_in_cannot_take_a_kind_of_this_package(plug: Callable[[str, str], None]) -> None:
    plug("length", WORKING)
    assert type(as_reward({"kind": "length", "target": 3})) is LengthReward


# --- a notebook ---

CELL = """
from typing import Literal
from cards_integrations.rewards import Reward, register_reward

@register_reward
class Polite(Reward):
    kind: Literal["polite"] = "polite"

    def score(self, prompt, responses):
        return [VALUE for _ in responses]
"""


def run_cell(code: str, **names: Any) -> type[Reward]:
    space = {"__name__": "__main__", **names}
    exec(compile(code, "<cell>", "exec", dont_inherit=True), space)
    return next(value for name, value in space.items() if name in ("Polite", "Rude"))


def test_a_cell_may_run_again(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"))
    for value in (1.0, 2.0):
        made = run_cell(CELL, VALUE=value)
        found = as_reward('{"kind": "polite"}')
        assert type(found) is made
        assert engine.score(found, "w6", ["w7"]) == [value]  # the code of the last run, not of the one before


def test_another_class_of_the_same_kind_is_refused() -> None:
    first = run_cell(CELL, VALUE=1.0)
    with pytest.raises(SettingsError, match=r"'polite' is taken by __main__\.Polite"):
        run_cell(CELL.replace("class Polite", "class Rude"), VALUE=2.0)
    assert REWARDS["polite"] is first
    with pytest.raises(SettingsError, match=r"'length' is taken by cards_integrations\.rewards\.length\.LengthReward"):
        register_reward(type("Longer", (LengthReward,), {"__module__": __name__}))


def test_a_class_of_the_same_name_in_another_module_is_refused() -> None:
    with pytest.raises(SettingsError, match="taken"):
        run_cell(CELL.replace("Polite", "LengthReward").replace("polite", "length") + "Polite = LengthReward", VALUE=1)
    assert REWARDS["length"] is LengthReward


def test_a_class_without_a_kind_is_refused() -> None:
    class Nameless(Reward):
        pass

    class Undecided(Reward):
        kind: Literal["this", "that"]

    for cls in (Nameless, Undecided):
        with pytest.raises(SettingsError, match=rf'{cls.__name__} has no kind: write kind: Literal\["my-reward"\]'):
            register_reward(cls)


# --- just an object ---


class Terse(Reward):
    """Registered nowhere."""

    kind: Literal["terse"] = "terse"
    per_word: float = 1.0

    def score(self, prompt: str, responses: list[str]) -> list[float]:
        assert prompt == "w9 w20"
        return [-self.per_word * len(response.split()) for response in responses]


class AsyncTerse(Terse):
    async def score(self, prompt: str, responses: list[str]) -> list[float]:  # type: ignore[override]
        return super().score(prompt, responses)


@pytest.mark.parametrize("kind", [Terse, AsyncTerse])
def test_an_unregistered_reward_guides(models: Callable[..., str], start: Start, kind: type[Terse]) -> None:
    answer = start(models("llama")).run(Request("w9 w20", DECODING, kind(per_word=0.5), max_tokens=12, seed=1))
    assert answer.reward == -0.5 * len(answer.text.split())
    assert answer.prompt_reward == 0.0
    assert {draft.verdict for segment in answer.segments for draft in segment.drafts} > {"accepted"}


def test_an_unregistered_reward_is_read_from_no_file() -> None:
    settings = CardsSettings(reward=Terse())
    assert settings.reward == Terse()
    with pytest.raises(SettingsError, match=r"reward\.kind 'terse' is not known"):
        as_reward(settings.model_dump(mode="json")["reward"])


def test_a_reward_that_can_do_nothing_says_so(models: Callable[..., str], start: Start) -> None:
    class Idle(Reward):
        kind: Literal["idle"] = "idle"

    with pytest.raises(Exception, match=r"Idle has neither score\(\) nor build\(\)"):
        start(models("llama")).score(Idle(), "w6", ["w7"])


def test_a_setting_may_be_a_list(models: Callable[..., str], start: Start) -> None:
    class Avoids(Reward):
        kind: Literal["avoids"] = "avoids"
        words: list[str]

        def score(self, prompt: str, responses: list[str]) -> list[float]:
            return [-float(sum(word in response.split() for word in self.words)) for response in responses]

    assert start(models("llama")).score(Avoids(words=["w7"]), "w6", ["w7 w8", "w8"]) == [-1.0, 0.0]


def test_a_class_in_place_of_an_object_is_refused() -> None:
    with pytest.raises(ValueError, match="LengthReward"):
        CardsSettings(reward=LengthReward)
