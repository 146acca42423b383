"""Brings finished grids into docs/results, each as a CSV file of runs and a CSV file of mean curves.

    python research/collect.py runs

`runs` is the output directory of `planned.py`. A grid is collected only if all of its runs are finished, so no seed is
left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ablation
import paper_protocol
from curves import mean_curves, write_curves
from planned import GRIDS
from rich.console import Console

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def runs_of(name: str) -> list[paper_protocol.Run]:
    """Return all runs of a planned grid."""
    program, *arguments = GRIDS[name]
    if program == "ablation":
        return ablation.grid(ablation.parse_arguments(arguments))
    return paper_protocol.grid(paper_protocol.parse_arguments([program, *arguments]))


def collect(name: str, runs: Path, results: Path) -> tuple[int, int]:
    """Write the two files of a grid if it is finished.

    Args:
        name: Name of the grid.
        runs: Output directory of `planned.py`.
        results: Directory to write to.

    Returns:
        The numbers of finished runs and of planned runs.
    """
    planned = runs_of(name)
    places = [runs / name / run.name / f"seed_{run.seed:02}" for run in planned]
    found = [paper_protocol.finished(run, place) for run, place in zip(planned, places, strict=True)]
    finished = [result for result in found if result is not None]
    if len(finished) == len(planned):
        paper_protocol.write_results(finished, results / f"{name}.csv")
        write_curves(mean_curves(finished, runs / name), results / f"{name}_curves.csv")
    return len(finished), len(planned)


def main(arguments: list[str] | None = None) -> None:
    """Collect every planned grid and print the number of its finished runs."""
    parser = argparse.ArgumentParser(description="Brings finished grids into docs/results.")
    parser.add_argument("runs", type=Path, help="the directory that planned.py filled")
    parsed = parser.parse_args(arguments)
    console = Console()
    for name in GRIDS:
        finished, planned = collect(name, parsed.runs, RESULTS)
        console.print(f"{name}: {finished} of {planned} runs" + ("" if finished == planned else ", not collected"))


if __name__ == "__main__":
    main()
