"""The numbers of docs/studies.md: how many pairs find an effect."""

from __future__ import annotations

import re

import pytest
from helpers.scripts import ROOT, run_code

from lightning_revbn.compare import least_detectable_effect

PAGE = (ROOT / "docs" / "studies.md").read_text()


@pytest.mark.parametrize(("row", "arms"), [("one arm", 1), ("each of three arms, at a third of the level", 3)])
def test_the_table_has_the_least_effects_that_pairs_find(row: str, arms: int) -> None:
    pairs, effects = (
        [float(cell) for cell in line.split("|")[2:-1]]
        for line in PAGE.splitlines()
        if line.strip().startswith(("| pairs |", f"| {row} |"))
    )
    assert effects == [round(least_detectable_effect(int(n), level=0.05 / arms), 2) for n in pairs]


def test_the_example_prints_the_number_of_pairs_that_the_page_names() -> None:
    (block,) = re.findall(r"^ *```python\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL)
    code = "\n".join(line.removeprefix("   ") for line in block.splitlines())
    (number,) = re.findall(r"# (\d+)$", code, re.MULTILINE)
    assert run_code(code).strip() == number
    assert f"needs {number} pairs" in PAGE
