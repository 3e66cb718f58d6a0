"""The wheel, what importing costs, and which way imports run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from trove_classifiers import classifiers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cards_integrations"
FRAMEWORKS = ("langchain", "langchain_core", "langgraph", "langsmith", "llama_index", "llama_index_instrumentation")
HEAVY = ("torch", "transformers", "numpy", "pydantic", *FRAMEWORKS)

# --- the wheel ---


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tree without a network."""
    if not all(map(importlib.util.find_spec, ("hatchling", "hatch_fancy_pypi_readme", "pip"))):
        pytest.skip("pip or the build backend (hatchling) is not installed here")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    built = subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def wheel(built: Path) -> list[str]:
    """The names in the wheel."""
    with zipfile.ZipFile(built) as opened:
        return opened.namelist()


def test_the_wheel_holds_the_package_and_nothing_else(wheel: list[str]) -> None:
    inside = {name for name in wheel if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in inside} == {"cards_integrations"}
    assert not [name for name in inside if "__pycache__" in name or name.endswith((".pyc", ".orig", ".jsonl"))]
    assert "cards_integrations/py.typed" in inside
    sources = {file.relative_to(ROOT).as_posix() for file in PACKAGE.rglob("*.py")}
    assert {name for name in inside if name.endswith(".py")} == sources


def test_the_wheel_brings_the_adapters(wheel: list[str]) -> None:
    adapters = {
        file.relative_to(ROOT).as_posix() for file in (PACKAGE / "rewards" / "adapters").rglob("*") if file.is_file()
    }
    adapters = {name for name in adapters if "__pycache__" not in name}
    assert any(name.endswith("adapter_model.safetensors") for name in adapters)
    assert adapters <= set(wheel)
    assert not [name for name in wheel if name.endswith((".bin", ".pt", ".pkl"))]


def test_the_wheel_brings_the_templates(wheel: list[str]) -> None:
    templates = {file.relative_to(ROOT).as_posix() for file in (PACKAGE / "templates").glob("*.*") if file.is_file()}
    assert "cards_integrations/templates/page.html.j2" in templates
    assert templates <= set(wheel)


# --- what PyPI shows ---

PROJECTS = [ROOT, *sorted((ROOT / "packages").iterdir())]


def project_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    return found


def test_its_readme_leads_out_of_pypi(built: Path) -> None:
    """Every link and every picture is in the repository, where the README has it."""
    with zipfile.ZipFile(built) as opened:
        [name] = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        text = opened.read(name).decode("utf-8")
    source = project_of(ROOT)["project"]["urls"]["Source"]
    linked = re.findall(r'\]\(([^)#][^)]*)\)|(?:src|srcset)="([^"]+)"', text)
    addresses = [one or other for one, other in linked]
    assert len(addresses) > 20
    own = [address.removeprefix(source) for address in addresses if address.startswith(source)]
    assert all(re.match(r"/(raw|blob)/main/", address) for address in own)
    assert not [address for address in addresses if not address.startswith("https://")]
    for address in own:
        assert (ROOT / address.split("/main/", 1)[1].partition("#")[0]).exists(), address
    assert {address for address in own if address.endswith(".png")} >= {"/raw/main/docs/trace.png"}


@pytest.mark.parametrize("folder", PROJECTS, ids=lambda folder: folder.name)
def test_its_metadata_is_whole(folder: Path) -> None:
    """One address, the Pythons that are tested, and only classifiers that there are."""
    project, own = project_of(folder)["project"], project_of(ROOT)["project"]
    assert set(project["urls"]) == {"Homepage", "Documentation", "Changelog", "Issues", "Source"}
    address = own["urls"]["Homepage"]
    assert all(url == address or url.startswith(f"{address}/") for url in project["urls"].values())
    for url in project["urls"].values():
        if found := re.fullmatch(r".+/(?:blob|tree)/main/(.+)", url):
            assert (ROOT / found[1]).exists(), url
    assert project["authors"] == own["authors"]
    assert project["classifiers"] == own["classifiers"]
    assert set(project["classifiers"]) <= classifiers
    versions = re.findall(r"PYTHONS = (.+)", (ROOT / "noxfile.py").read_text(encoding="utf-8"))[0]
    listed = [each.rsplit(" ", 1)[1] for each in project["classifiers"] if re.search(r"Python :: 3\.", each)]
    assert json.loads(versions) == listed
    license_file = folder / "LICENSE"
    assert not license_file.is_symlink()  # no archive may lead out of itself
    assert license_file.read_bytes() == (ROOT / "LICENSE").read_bytes()


# --- what is installed ---


def test_the_pinned_versions_are_those_that_the_project_admits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for file, requirements in {
        "constraints.txt": [*project["dependencies"], *extras["dev"]],
        "constraints-docs.txt": extras["docs"],
    }.items():
        pinned = versions(file)
        for needed in map(Requirement, requirements):
            assert needed.name.startswith("cards-integrations") or needed.specifier.contains(
                pinned[canonicalize_name(needed.name)]
            ), needed


@pytest.mark.parametrize("of", ["", "-docs"])
def test_the_lock_has_a_hash_for_every_pinned_version(of: str) -> None:
    """But for torch, of which every platform has builds of its own; `make lock` writes it."""
    expected = versions(f"constraints{of}.txt")
    expected.pop("torch", None)
    lock = f"requirements{of}.lock"
    assert versions(lock) == expected
    entries = re.split(r"\n(?=\S)", (ROOT / lock).read_text(encoding="utf-8"))
    assert all("--hash=sha256:" in entry for entry in entries)


def versions(file: str) -> dict[str, str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


# --- what is imported ---


def imported(code: str) -> dict[str, object]:
    """The top-level modules that a process has after this code."""
    told = "\nimport json, sys\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    ran = subprocess.run([sys.executable, "-c", code + told], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return dict.fromkeys(json.loads(ran.stdout.splitlines()[-1]))


def test_the_package_alone_imports_nothing_heavy() -> None:
    assert not [name for name in HEAVY if name in imported("import cards_integrations")]


FORBIDDING = """
import sys
class Forbids:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FRAMEWORKS:
            raise ImportError(f"{name} is forbidden here")
sys.meta_path.insert(0, Forbids())
"""
CORE = [
    *("engine.engine", "engine.worker", "engine.session", "engine.scheduler", "engine.draft_pool", "settings"),
    *("decoding", "rewards", "rewards.remote", "rewards.scorers.incremental", "models", "models.sources"),
    *("models.local.language_model", "models.vllm.language_model", "transformer.forward", "chat.grammar"),
    *("chat.template", "chat.response_format", "picture", "trace", "study"),
]


def test_the_core_needs_neither_framework() -> None:
    modules = "".join(f"import cards_integrations.{name}\n" for name in CORE)
    assert "cards_integrations" in imported(FORBIDDING.replace("FRAMEWORKS", repr(FRAMEWORKS)) + modules)


# --- which way imports run ---


def environment() -> dict[str, str]:
    """With the commands of this Python's environment first."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_imports_run_downward_and_in_no_circle() -> None:
    """The contracts of pyproject.toml, as `make lint` checks them."""
    ran = subprocess.run(["lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert ran.returncode == 0, ran.stdout
    assert "0 broken" in ran.stdout
