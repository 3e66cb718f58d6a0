"""Decoding methods of one's own: a plug-in, a notebook's cell, or just an object (`test_outside.py` installs one)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import plugins
import pytest
from conftest import Start

from cards_integrations.decoding import (
    METHODS,
    BestOfN,
    Cards,
    Decoding,
    Sampling,
    Session,
    as_decoding,
    known_methods,
    register_method,
)
from cards_integrations.engine import Request
from cards_integrations.errors import SettingsError
from cards_integrations.settings import CardsSettings

MINE = """
from typing import Literal
from cards_integrations.decoding import Decoding, FixedLength, register_method

@register_method
class Mine(Decoding):
    method: Literal["mine"] = "mine"
    length: int = 4

    async def generate(self, session):
        while not session.finished:
            async for draft in session.drafts(until=FixedLength(length=self.length), limit=1, scored=False):
                await session.keep(draft)
"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a test registers is forgotten."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def plug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`plug(name, code)` puts a distribution with one method on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, code: plugins.leave(tmp_path, "decoding", name, code)


def test_a_plug_in_is_found_by_its_name(plug: Callable[[str, str], None], tmp_path: Path) -> None:
    plug("mine", MINE)
    with pytest.raises(SettingsError, match=r"decoding\.method 'mien' is not known\. Did you mean 'mine'"):
        as_decoding("mien")
    assert "mine" in known_methods()
    assert "mine" not in METHODS  # nothing is imported before it is asked for
    file = tmp_path / "cards.yaml"
    file.write_text("decoding: {method: mine, length: 7}\n")
    settings = CardsSettings.from_yaml(file)
    assert type(settings.decoding).__module__ == "cards_plugin_mine"
    assert settings.decoding.model_dump() == {"method": "mine", "length": 7}
    assert METHODS["mine"] is type(settings.decoding)
    assert CardsSettings.model_validate_json(settings.model_dump_json()) == settings
    mine: type[Any] = type(settings.decoding)
    assert as_decoding("mine") == as_decoding('{"method": "mine"}') == mine()
    with pytest.raises(ValueError, match="size"):
        as_decoding({"method": "mine", "size": 3})


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("unbound", "import a_module_that_is_not_here", "does not load: No module named 'a_module_that_is_not_here'"),
        ("raising", "raise RuntimeError('the licence has expired')", "does not load: the licence has expired"),
        ("foreign", "class Mine: ...", "is not a subclass of Decoding"),
        ("instance", MINE + "Mine = Mine()", "is not a subclass of Decoding"),
    ],
)
def test_a_broken_plug_in_is_named(plug: Callable[[str, str], None], name: str, code: str, says: str) -> None:
    plug(name, code)
    with pytest.raises(SettingsError, match=rf"decoding plug-in '{name}' \(cards_plugin_{name}:Mine\) {says}"):
        as_decoding(name)
    with pytest.raises(ValueError, match=rf"plug-in '{name}'"):
        CardsSettings(decoding={"method": name})
    assert as_decoding("best_of_n") == BestOfN()  # the others still work


def test_a_plug_in_cannot_take_a_name_of_this_package(plug: Callable[[str, str], None]) -> None:
    plug("cards", MINE)
    assert type(as_decoding("cards")) is Cards


def run_cell(code: str) -> type[Decoding]:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "<cell>", "exec", dont_inherit=True), space)
    return next(value for name, value in space.items() if name in ("Mine", "Yours"))


def test_a_cell_may_run_again(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"))
    for length in (4, 3):
        made = run_cell(MINE.replace("length: int = 4", f"length: int = {length}"))
        found = as_decoding("mine")
        assert type(found) is made
        answer = engine.run(Request("w6", found, max_tokens=12, seed=1))
        assert answer.method == "mine"
        assert {len(segment.token_ids) for segment in answer.segments[:-1]} == {length}
        plain = engine.run(Request("w6", Sampling(), max_tokens=12, seed=1))
        assert len(answer.segments) > 1
        assert answer.segments[0].token_ids == plain.token_ids[:length]


def test_another_class_of_the_same_name_is_refused() -> None:
    first = run_cell(MINE)
    with pytest.raises(SettingsError, match=r"decoding method 'mine' is taken by __main__\.Mine"):
        run_cell(MINE.replace("class Mine", "class Yours"))
    assert METHODS["mine"] is first
    with pytest.raises(SettingsError, match=r"'cards' is taken by cards_integrations\.decoding\.cards\.Cards"):
        register_method(type("Mine", (Cards,), {"__module__": __name__}))


def test_a_class_without_a_name_is_refused() -> None:
    class Nameless(Decoding):
        pass

    class Undecided(Decoding):
        method: Literal["this", "that"]

    for cls in (Nameless, Undecided):
        with pytest.raises(SettingsError, match=rf"{cls.__name__} has no method: write method: Literal\["):
            register_method(cls)


def test_an_unregistered_method_writes(models: Callable[..., str], start: Start) -> None:
    class Whole(Sampling):
        method: Literal["whole"] = "whole"  # type: ignore[assignment]

        async def generate(self, session: Session) -> None:
            await super().generate(session)

    engine = start(models("llama"))
    found, plain = (engine.run(Request("w6", each, max_tokens=9, seed=2)) for each in (Whole(), Sampling()))
    assert (found.method, found.text) == ("whole", plain.text)
    with pytest.raises(SettingsError, match=r"decoding\.method 'whole' is not known"):
        as_decoding(Whole().model_dump())
