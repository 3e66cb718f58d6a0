"""The site: every page is in its navigation, and every public name is described, in the code and in the reference."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import faces
import griffe

from cards_integrations.cli.generate import as_row
from cards_integrations.decoding import Sampling
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards.value_head import ValueCard
from cards_integrations.study import compare

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
INTERNAL = {"cards_integrations.http_client", "cards_integrations.picture", "cards_integrations.rewards.remote"}
"""Modules whose `__all__` is for other modules of this package."""
ENTRY = re.compile(
    r"^::: (?P<path>[\w.]+)(?:\n    options:\n      inherited_members: \[(?P<inherited>.+)\])?$", re.MULTILINE
)
OPTIONS = "cards_integrations.settings.Options"


@cache
def package() -> griffe.Module:
    found = griffe.load("cards_integrations", search_paths=[ROOT], resolve_aliases=True, resolve_external=False)
    assert isinstance(found, griffe.Module)
    return found


def modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for each in module.modules.values():
        if not each.is_alias:
            yield from modules(each)


def target(path: str) -> griffe.Object:
    """What is defined under this path; of a module and a function of the same name, the function."""
    found = package()[path.removeprefix("cards_integrations.")]
    if found.is_module:
        found = found[found.name]
    return found.final_target if isinstance(found, griffe.Alias) else found


@cache
def public() -> dict[str, griffe.Object]:
    """Everything in the `__all__` of a public module, by the path of its definition."""
    exporting = [module for module in modules(package()) if module.exports and module.path not in INTERNAL]
    names = [f"{module.path}.{name}" for module in exporting for name in module.exports or ()]
    return {found.path: found for found in map(target, names)}


def undescribed(cls: griffe.Class) -> Iterator[str]:
    """The methods, properties and declared fields of a class that neither it nor a base of it describes."""
    sections = [each for base in [cls, *cls.mro()] if base.docstring for each in base.docstring.parse("google")]
    listed = {
        field.name for each in sections if each.kind is griffe.DocstringSectionKind.attributes for field in each.value
    }
    for name, member in cls.members.items():
        if name.startswith("_") or name == "model_config" or member.is_alias or member.docstring:
            continue
        if isinstance(member, griffe.Attribute) and "class-attribute" not in member.labels and member.value is not None:
            continue  # set by a method
        if name not in listed and not any(name in base.members and base.members[name].docstring for base in cls.mro()):
            yield f"{cls.path}.{name}"


def test_every_public_name_has_a_docstring() -> None:
    assert not [path for path, found in public().items() if not found.docstring]


def test_every_member_of_a_public_class_is_described() -> None:
    classes = [found for found in public().values() if isinstance(found, griffe.Class)]
    assert len(classes) > 60
    assert not [name for each in classes for name in undescribed(each)]


def entries() -> dict[str, set[str]]:
    """What the reference describes, and which inherited members with it."""
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md")]
    found = [each for page in pages for each in ENTRY.finditer(page)]
    assert len(found) == len({each["path"] for each in found}) == sum(page.count("\n:::") for page in pages)
    return {target(each["path"]).path: set((each["inherited"] or "").split(", ")) - {""} for each in found}


def test_every_public_name_is_in_the_reference() -> None:
    assert set(public()) - {"cards_integrations.__version__"} <= set(entries())


def inherited_fields(cls: griffe.Class) -> set[str]:
    """The described fields that a class has from bases that are not public."""
    hidden = [base for base in cls.mro() if base.path not in public()]
    members = [member for base in hidden for member in base.members.values() if member.docstring]
    return {member.name for member in members if "instance-attribute" in member.labels} - set(cls.members)


def test_fields_from_a_base_that_is_not_public_are_in_the_reference() -> None:
    """Of all classes but the faces, whose options are described once."""
    described = entries()
    classes = {path: found for path in described if isinstance(found := target(path), griffe.Class)}
    own = {path: cls for path, cls in classes.items() if OPTIONS not in {base.path for base in cls.mro()}}
    assert not {path: missing for path, cls in own.items() if (missing := inherited_fields(cls) - described[path])}


def test_every_page_is_in_the_navigation_and_in_the_list_for_programs() -> None:
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    navigation, listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("llmstxt:")
    assert set(re.findall(r"[\w/-]+\.md", navigation)) == pages
    assert set(re.findall(r"[\w-]+\.md", listed)) == {page for page in pages if "/" not in page}


# --- docs/files.md ---


def documented(heading: str) -> set[str]:
    """The fields in the table with this heading."""
    text = (DOCS / "files.md").read_text(encoding="utf-8")
    rows = text.partition(f"| `{heading}` | |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}


def test_the_columns_of_files_are_as_documented(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    with faces.cards_llm(max_tokens=4) as llm:
        assert documented("generate --json") == set(as_row(llm.align("Hello", logprobs=True)))
        found = compare(llm, {"plain": Sampling()}, ["Hello"], out=out, progress=False)
    [row] = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert documented("compare --out") == set(row) - set(Sampler.model_fields)
    assert documented("compare --json") == set(found.summary()["plain"])
    assert documented("train-value --json") == set(ValueCard.model_fields)


def test_the_columns_of_judged_pairs_are_as_documented() -> None:
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (ROOT / "benchmarks/results/judge-smollm2.jsonl").read_text("utf-8").splitlines()
    ]
    assert documented("judge --out") == set(rows[0])
