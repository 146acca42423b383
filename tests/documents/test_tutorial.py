"""The tutorial runs where a reader installs what it asks for, and prints what it shows."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from helpers.bare_environment import Environments
from helpers.notebook import FIGURE, TUTORIAL, code_cells, output_of
from helpers.scripts import ROOT


def words(text: str) -> list[str]:
    """Return the text without numbers and lines of a table, which differ between processors."""
    return re.sub(r"[-+\d.]+", " ", text).split()


def test_the_tutorial_prints_what_it_shows_but_for_numbers(environments: Environments, tmp_path: Path) -> None:
    notebook = json.loads(TUTORIAL.read_text())
    assert '".[compare,plots]" scikit-learn' in "".join(notebook["cells"][0]["source"])
    for file in (TUTORIAL, ROOT / "tests" / "processes" / "scripts" / "run_notebook.py"):
        shutil.copy(file, tmp_path)
    variables = {"PATH": f"{environments.extras.bin}{os.pathsep}{os.environ['PATH']}", "MPLBACKEND": "agg"}
    run = environments.extras.run("python", "run_notebook.py", TUTORIAL.name, cwd=tmp_path, env=variables)
    shown = [output_of(cell) for cell in code_cells(notebook)]
    assert [words(text) for text in json.loads(run.stdout)] == [words(text) for text in shown]
    assert "In our results every training of up to 360 steps from scale 0.1 ended below its baseline" in " ".join(
        run.stderr.split()
    )
    for figure in (FIGURE, "layers.png"):
        assert (tmp_path / figure).stat().st_size > 1000


def test_the_conclusion_of_the_tutorial_is_that_of_its_numbers() -> None:
    notebook = json.loads(TUTORIAL.read_text())
    table = output_of(code_cells(notebook)[-1])
    assert "The difference is clearly in the other direction" in table
    assert "too few" in table
    conclusion = "".join(notebook["cells"][-1]["source"])
    assert "**Here it did not help.**" in conclusion
