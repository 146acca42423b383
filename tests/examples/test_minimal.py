"""The minimal example prints what the README shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.scripts import ROOT, run_python


def test_the_readme_shows_what_the_minimal_example_prints(tmp_path: Path) -> None:
    table, metrics = re.findall(r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    run = run_python(ROOT / "examples" / "minimal.py", cwd=tmp_path)
    assert table in run.stderr
    printed = dict(re.findall(r"^(revbn/\S+) +(\S+)$", run.stdout, re.MULTILINE))
    shown = dict(line.split() for line in metrics.splitlines())
    assert printed.keys() == shown.keys()
    for name, value in shown.items():  # another processor rounds sums differently
        assert float(printed[name]) == pytest.approx(float(value), rel=0.05), name
    assert [*tmp_path.iterdir()] == []
