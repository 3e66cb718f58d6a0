"""Make the notebooks from the plain sources beside them: `make cookbook`, or `python cookbook/build.py 01 03`."""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent

for source in sorted(HERE.glob("0*.py")):
    if not sys.argv[1:] or source.stem[:2] in sys.argv[1:]:
        notebook = nbformat.from_dict(jupytext.read(source))
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"  # or every run would change them
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": HERE}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb"))
