"""The wheel, what importing costs, and which way imports run."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cards_integrations"
FRAMEWORKS = ("langchain", "langchain_core", "langgraph", "langsmith", "llama_index", "llama_index_instrumentation")
HEAVY = ("torch", "transformers", "numpy", "pydantic", *FRAMEWORKS)

# --- the wheel ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in the wheel, built from the tree without a network."""
    if not all(map(importlib.util.find_spec, ("hatchling", "pip"))):
        pytest.skip("pip or the build backend (hatchling) is not installed here")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    built = subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as opened:
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


# --- what is installed ---


def test_the_pinned_versions_are_those_that_the_project_admits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = versions("constraints.txt")
    for needed in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]]):
        assert needed.name.startswith("cards-integrations") or needed.specifier.contains(
            pinned[canonicalize_name(needed.name)]
        ), needed


def test_the_lock_has_a_hash_for_every_pinned_version() -> None:
    """But for torch, of which every platform has builds of its own; `make lock` writes it."""
    expected = versions("constraints.txt")
    del expected["torch"]
    assert versions("requirements.lock") == expected
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text(encoding="utf-8"))
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
    *("engine", "worker", "session", "scheduler", "drafts", "decoding", "rewards", "models", "trace", "settings"),
    *("models.local", "models.vllm", "models.grammar", "models.transformer", "rewards.incremental", "rewards.remote"),
    *("picture", "response_format", "study"),
]


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_neither_framework(name: str) -> None:
    code = FORBIDDING.replace("FRAMEWORKS", repr(FRAMEWORKS)) + f"import cards_integrations.{name}"
    assert f"cards_integrations.{name}".partition(".")[0] in imported(code)


# --- which way imports run ---

LAYERS = [  # from the top; who stands in one line is of one layer
    ["cli", "demo"],
    ["study"],
    ["__init__", "llm", "langchain", "langchain_runs", "llama_index", "completion"],
    ["messages", "structured_output", "retrieval", "schemas"],
    ["settings"],
    ["engine"],
    ["worker", "scales"],
    ["scheduler"],
    ["session", "response_format"],
    ["drafts"],
    ["decoding", "rewards"],
    ["models", "vllm_plugin", "picture"],
    ["trace", "errors", "uncertainty", "threads"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
KNOWN_UPWARD = {("trace", "picture")}  # drawn on demand, inside its methods


def layer(module: str) -> str:
    return module.removeprefix("cards_integrations").lstrip(".").partition(".")[0] or "__init__"


def edges() -> Iterator[tuple[str, str]]:
    """(who, whom) between the package's parts, at run time: imports for the type checker are left out."""
    for file in PACKAGE.rglob("*.py"):
        relative = file.relative_to(PACKAGE)
        who = relative.parts[0].removesuffix(".py")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        unread = [
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        ]
        for node in ast.walk(tree):
            if node in unread or not isinstance(node, ast.ImportFrom):
                continue
            module = node.module or ""
            if module == "cards_integrations":
                yield from ((who, layer(f"{module}.{name.name}")) for name in node.names)
            elif module.startswith("cards_integrations."):
                yield who, layer(module)


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - LEVEL.keys() == set()


def test_imports_run_downward_only() -> None:
    upward = {(who, whom) for who, whom in edges() if whom in LEVEL and LEVEL[whom] < LEVEL[who]}
    assert upward - {("llm", "study")} == KNOWN_UPWARD


def test_decoding_knows_neither_tensors_nor_rewards() -> None:
    assert {whom for who, whom in edges() if who == "decoding"} <= {
        "decoding",
        "models",
        "trace",
        "errors",
        "uncertainty",
    }
    assert {whom for who, whom in edges() if who == "rewards"} <= {"rewards", "models", "trace", "errors", "threads"}
    assert {whom for who, whom in edges() if who == "models"} <= {"models", "trace", "errors"}
