"""Make the notebooks from the plain sources beside them: `make cookbook`, or `python cookbook/build.py 01 03`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
os.environ["CARDS_PROGRESS"] = "0"  # "loading ..." is no part of what a cell gives


def quiet(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Without progress bars and warnings, and what was printed between them in one piece."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            continue
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


for source in sorted(HERE.glob("0*.py")):
    if not sys.argv[1:] or source.stem[:2] in sys.argv[1:]:
        notebook = nbformat.from_dict(jupytext.read(source))
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"  # or every run would change them
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": HERE}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times
            if cell.cell_type == "code":
                cell.outputs = quiet(cell.outputs)
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb"))
