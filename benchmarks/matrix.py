"""Trains every cell of the matrix of tests/processes/scripts/matrix.py and prints the outcome of each.

The cells are {strategy} x {precision} x {automatic, manual optimization} x {1, 2 optimizers} x {accumulation} x
{clipping}. `--runs FOLDER` keeps the runs there, and skips a strategy whose results are complete there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.cells import AXES, CELLS, Cell
from helpers.scripts import run_ranks

from lightning_revbn.core.table import plain_table

Result = dict[str, Any]


def results_of(strategy: str, folder: Path) -> dict[Cell, Result]:
    """Run the cells of a strategy, unless the folder has the results of all its cells."""
    file = folder / "results.json"
    count = sum(cell.strategy == strategy for cell in CELLS)
    if not file.exists() or len(json.loads(file.read_text())) < count:
        print(f"{strategy}: {count} cells", file=sys.stderr, flush=True)
        run_ranks("matrix.py", strategy, folder, limit=math.inf)
    return {Cell(*(result.pop(axis) for axis in AXES)): result for result in json.loads(file.read_text())}


class Notes(dict[str, int]):
    """Numbers texts in the order of their first use."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self) + 1
        return self[text]


def told(result: Result, notes: Notes) -> str:
    """Return an outcome in a few words, with the number of the note that explains it."""
    if result["outcome"] != "ok":
        return f"{result['outcome']} [{notes[result['detail']]}]"
    return f"ok, by hand [{notes[result['trainer_arguments']]}]" if result["trainer_arguments"] else "ok"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder")
    with tempfile.TemporaryDirectory() as temporary:
        runs: Path = parser.parse_args().runs or Path(temporary)
        results: dict[Cell, Result] = {}
        for strategy in AXES["strategy"]:
            results |= results_of(strategy, (runs / strategy.replace(" ", "_")).absolute())

    notes, rows = Notes(), list[list[str]]()
    settings = [axis for axis in AXES if axis not in ("strategy", "precision")]
    for values in itertools.product(*(AXES[axis] for axis in settings)):
        outcomes: list[str] = []
        for strategy in AXES["strategy"]:
            of_precision = {p: told(results[Cell(strategy, p, *values)], notes) for p in AXES["precision"]}
            same = set(of_precision.values())
            outcomes.append(same.pop() if len(same) == 1 else ", ".join(map(" ".join, of_precision.items())))
        rows.append([*map(str, values), *outcomes])
    kinds = [result["outcome"] for result in results.values()]
    summary = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("ok", "refused", "impossible", "wrong"))
    print(
        f"torch {version('torch')}, lightning {version('lightning')}. What a row says holds for each of the precisions"
    )
    print(", ".join(AXES["precision"]) + ".\n")
    print(plain_table([*settings, *AXES["strategy"]], rows, f"{len(kinds)} cells: {summary}"))
    for text, number in notes.items():
        print(f"[{number}] {text}")

    data_parallel = ["ddp", "ddp_spawn", "ddp_fork"]
    trained = [cell for cell, result in results.items() if cell.strategy == "ddp" and result["outcome"] == "ok"]
    same = sum(
        len({results[cell._replace(strategy=name)]["digest"] for name in data_parallel}) == 1 for cell in trained
    )
    print(f"\n{', '.join(data_parallel)} end with the same values, to the bit, in {same} of {len(trained)} cells.")
    raise SystemExit("wrong" in kinds)


if __name__ == "__main__":
    main()
