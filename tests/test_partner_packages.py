"""The thin packages under `packages/`: they build, hold what they say, and lead to the names of this one."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"


@pytest.mark.parametrize(
    ("package", "module", "names"),
    [
        ("langchain-cards", "langchain_cards", ["CardsCompletion", "ChatCards", "documents_chain"]),
        ("llama-index-llms-cards", "llama_index.llms.cards", ["CardsLLM", "RetrievedContext"]),
    ],
)
def test_an_archive_becomes_a_wheel_that_has_the_names(
    package: str, module: str, names: list[str], tmp_path: Path
) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run([*build, "-t", "sdist"], cwd=PACKAGES / package, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "source", filter="data")
    [source] = (tmp_path / "source").iterdir()
    subprocess.run([*build, "-t", "wheel"], cwd=source, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[1] in archive.name  # the version is that of the tag, not the fallback
    with ZipFile(wheel) as files:
        files.extractall(tmp_path / "installed")
        listed = files.namelist()
        [metadata] = [files.read(name).decode() for name in listed if name.endswith("METADATA")]
    folder = module.replace(".", "/")
    assert {name for name in listed if ".dist-info/" not in name} == {f"{folder}/__init__.py", f"{folder}/py.typed"}
    assert "Requires-Dist: cards-integrations" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in listed)
    same = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); import {module} as there; "
        f"import cards_integrations as here; assert there.__all__ == {names!r}; "
        f"assert all(getattr(there, name) is getattr(here, name) for name in {names!r})"
    )
    subprocess.run([sys.executable, "-c", same], check=True)
