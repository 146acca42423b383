"""Writes the outputs of the tutorial into its file, and draws its figure.

PYTHONPATH=.:tests python tests/helpers/notebook.py
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from helpers.scripts import ROOT, run_python

TUTORIAL = ROOT / "docs" / "tutorial.ipynb"
SCRIPT = ROOT / "tests" / "processes" / "scripts" / "run_notebook.py"
FIGURE = "tutorial.png"


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def output_of(cell: dict[str, Any]) -> str:
    """Return the text that a cell of code has stored."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


def write_outputs() -> None:
    notebook = json.loads(TUTORIAL.read_text())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        said = run_python(SCRIPT, TUTORIAL, cwd=Path(folder), env={"PATH": path, "MPLBACKEND": "agg"})
        shutil.copy(Path(folder, FIGURE), TUTORIAL.parent)
    for cell, text in zip(code_cells(notebook), json.loads(said.stdout), strict=True):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell["outputs"] = [stream] if text else []
    TUTORIAL.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_outputs()
