"""Writes the tables and figures of docs/results.md from the CSV files in docs/results.

    python research/collect.py runs        # brings finished grids into docs/results
    python research/results_page.py

A row of a table is an arm. `p (Holm)` corrects the p-values of all arms with the same baseline together. A planned grid
without runs is listed as not run.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from cells import LEVEL, MARGIN, Cell, read_cells
from collect import RESULTS, runs_of
from gains_figure import draw_gains
from planned import GRIDS

PAGE = RESULTS.with_suffix(".md")
SUMMARY = "summary.csv"
HEADER = (
    "Arm",
    "Validation",
    "Test",
    "std",
    "Best epoch",
    "Difference",
    "95 % interval",
    "detectable",
    "p",
    "p (Holm)",
    "overtakes",
    "time",
)
PREFIXES = ("digits", "mnist1d", "fashion-mnist", "ablation", "adamw_rate")
"""Prefixes of the grids' names; each prefix has its own place on the page."""


def read_all(folder: Path) -> dict[str, list[Cell]]:
    """Return the cells of every planned grid by name; a grid that was not run has an empty list."""
    return {name: read_cells(folder, name) for name in GRIDS}


def tables(grids: dict[str, list[Cell]]) -> dict[str, str]:
    """Return the tables of the page by name, as Markdown."""
    found = {prefix: _result_table(prefix, grids) for prefix in PREFIXES}
    return {**found, "arms": _arm_table(grids), "planned": _planned_table(grids)}


def _markdown(header: Sequence[str], left: int, rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first `left` columns are aligned left, and the others right."""
    align = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, align, *rows))


def _result_table(prefix: str, grids: dict[str, list[Cell]]) -> str:
    """Return a table for each grid, below the grid's name."""
    parts: list[str] = []
    for name, cells in grids.items():
        if name.startswith(prefix):
            table = f":\n\n{_markdown(HEADER, 1, [_row(cell) for cell in cells])}" if cells else ": not run"
            parts.append(f"**{name.replace('_', ' ')}**{table}")
    return "\n\n".join(parts)


def _row(cell: Cell) -> list[str]:
    scores = list(cell.scores.values())
    means = [f"{value:.2f}" for value in (cell.validation, statistics.fmean(scores), statistics.stdev(scores))]
    first = [cell.arm.replace("_", " "), *means, f"{cell.best_epoch:.2f}"]
    if cell.comparison is None:
        return [*first, *[""] * (len(HEADER) - len(first))]
    test = cell.comparison.test
    low, high = test.confidence_interval
    return [
        *first,
        f"{test.mean_difference:+.2f}",
        f"{low:+.2f} to {high:+.2f}",
        f"{cell.detectable:.2f}",
        f"{test.p_value:.2g}",
        f"{cell.comparison.corrected:.2g}",
        "never" if cell.overtakes is None else str(cell.overtakes),
        "never" if cell.relative_time is None else f"{cell.relative_time:.2f}",
    ]


def compared(grids: dict[str, list[Cell]]) -> dict[str, list[Cell]]:
    """Return the cells of every compared arm, by name of the arm, without ablations."""
    arms: dict[str, list[Cell]] = {}
    for name, cells in grids.items():
        for cell in cells:
            if cell.comparison is not None and not name.startswith("ablation"):
                arms.setdefault(cell.arm, []).append(cell)
    return arms


def judge(cells: Sequence[Cell]) -> str:
    """Say whether an arm gains on digits and loses nowhere.

    Args:
        cells: All cells of the arm.

    Returns:
        `"no"` if the arm does not gain on digits after Holm's correction, or a cell does not exclude a loss of the
        margin; `"not everywhere"` if some data set has no cell of the arm; otherwise `"yes"`.
    """
    on_digits = [cell for cell in cells if cell.grid == "digits"]
    gains = any(cell.comparison is not None and cell.comparison.corrected <= LEVEL for cell in on_digits)
    if not gains or any(cell.loss_excluded > LEVEL for cell in cells):
        return "no"
    everywhere = all(any(cell.grid.startswith(name) for cell in cells) for name in ("digits", "mnist1d", "fashion"))
    return "yes" if everywhere else "not everywhere"


def _arm_table(grids: dict[str, list[Cell]]) -> str:
    """Return each arm's worst and best cell, and the number of its cells that exclude a loss above the margin."""
    header = [
        "Arm",
        "Worst cell",
        "Difference",
        "Best cell",
        "Difference",
        "Cells",
        f"loss < {MARGIN:g}",
        "p",
        "safe",
    ]
    rows: list[list[str]] = []
    for arm, cells in compared(grids).items():
        worst, best = (find(cells, key=lambda cell: cell.difference) for find in (min, max))
        p_values = [cell.loss_excluded for cell in cells]
        rows.append(
            [
                arm.replace("_", " "),
                worst.grid.replace("_", " "),
                f"{worst.difference:+.2f}",
                best.grid.replace("_", " "),
                f"{best.difference:+.2f}",
                str(len(cells)),
                str(sum(p <= LEVEL for p in p_values)),
                f"{max(p_values):.2g}",
                judge(cells),
            ]
        )
    return _markdown(header, 2, rows)


def _planned_table(grids: dict[str, list[Cell]]) -> str:
    rows: list[list[str]] = []
    for name, cells in grids.items():
        planned = runs_of(name)
        arms, seeds = len({run.name for run in planned}), len({run.seed for run in planned})
        state = f"[{sum(len(cell.scores) for cell in cells)}](results/{name}.csv)" if cells else "not run"
        rows.append([f"`{name}`", str(arms), str(seeds), state])
    return _markdown(["Grid", "Arms", "Seeds", "Runs"], 1, rows)


SUMMARY_COLUMNS = (
    "grid",
    "arm",
    "baseline",
    "n",
    "validation",
    "mean",
    "std",
    "best_epoch",
    "mean_difference",
    "ci_low",
    "ci_high",
    "d_z",
    "detectable",
    "p",
    "p_wilcoxon",
    "p_holm",
    "p_no_loss",
    "overtakes",
    "relative_time",
)


def summary(grids: dict[str, list[Cell]]) -> str:
    """Return a row for each arm of each grid, as CSV; undefined values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SUMMARY_COLUMNS)
    for cells in grids.values():
        for cell in cells:
            writer.writerow(_summary_row(cell))
    return text.getvalue()


def _summary_row(cell: Cell) -> Iterator[str]:
    scores = list(cell.scores.values())
    yield from (cell.grid, cell.arm, cell.baseline, str(len(scores)))
    values: list[float | None] = [cell.validation, statistics.fmean(scores), statistics.stdev(scores), cell.best_epoch]
    if cell.comparison is not None:
        test = cell.comparison.test
        values += [test.mean_difference, *test.confidence_interval, test.effect_size, cell.detectable, test.p_value]
        values += [cell.comparison.wilcoxon, cell.comparison.corrected, cell.loss_excluded]
        values += [cell.overtakes, cell.relative_time]
    values += [None] * (len(SUMMARY_COLUMNS) - 4 - len(values))
    for value in values:
        yield "" if value is None else f"{value:.4g}" if abs(value) < 10 else f"{value:.3f}"


def fill(page: str, found: dict[str, str]) -> str:
    """Return the page with the text between each pair of marks replaced by the mark's table."""
    for name, table in found.items():
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = marked.subn(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", page)
        if count != 1:
            raise ValueError(f"{PAGE} has {count} places for the table {name!r}")
    return page


def main() -> None:
    """Write the page, the summary and the figures."""
    grids = read_all(RESULTS)
    PAGE.write_text(fill(PAGE.read_text(), tables(grids)))
    (RESULTS / SUMMARY).write_text(summary(grids))
    draw_gains(RESULTS, [name for name, cells in grids.items() if cells])


if __name__ == "__main__":
    main()
