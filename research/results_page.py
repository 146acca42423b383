"""Writes the tables of docs/results.md, and docs/results/summary.csv, from the runs in docs/results.

    python research/results_page.py

Every other CSV file there is the `results.csv` of one command, which the page names. A row of a table is an arm; where
it says `p (Holm)`, the p-values of all arms with the same baseline are corrected together.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_protocol import by_arm, choose

from lightning_revbn.compare import least_detectable_effect
from lightning_revbn.runs.comparison import POWER, Comparison, compare

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
RUNS = PAGE.with_suffix("")
SUMMARY = "summary.csv"
HEADER = ("Validation", "Test", "std", "Difference", "95 % interval", "detectable", "p", "p (Holm)")


@dataclass(frozen=True)
class Family:
    """The arms that share a baseline and are corrected together.

    Attributes:
        grid: Name of the file.
        first: A row of it.
        name: What tells this family from the others of the file.
        baseline: Scores on test data by seed.
        comparisons: Of every other arm with it.
        validation: Mean on validation data by arm.
        chosen: The arm that is best there; None in an ablation, where nothing is chosen.
    """

    grid: str
    first: dict[str, Any]
    name: str
    baseline: dict[int, float]
    comparisons: list[Comparison]
    validation: dict[str, float]
    chosen: str | None


def read_families(folder: Path) -> list[Family]:
    """Read all runs.

    Args:
        folder: Where the CSV files are.

    Returns:
        The families, in the order of data set, images and epochs.
    """
    families: list[Family] = []
    for file in folder.glob("*.csv"):
        if file.name != SUMMARY:
            with file.open(newline="") as opened:
                families += _families(file.stem, [_typed(row) for row in csv.DictReader(opened)])
    return sorted(families, key=lambda f: (f.grid.split("_")[0], f.first["train_images"], f.first["epochs"], f.grid))


def _typed(row: dict[str, str]) -> dict[str, Any]:
    numbers = {name: int(row[name] or 0) for name in ("train_images", "epochs", "seed")}
    return {**row, **numbers, **{name: float(row[name]) for name in ("val_acc", "test_acc")}}


def _families(grid: str, rows: Sequence[dict[str, Any]]) -> Iterator[Family]:
    ablation = grid.startswith("ablation")
    if ablation:  # every scale has the same baseline
        scales = dict.fromkeys(row["scale"] for row in rows if row["scale"])
        parts = {f"scale {scale}": [row for row in rows if row["scale"] in ("", scale)] for scale in scales}
    else:
        inputs = {"False": "without input normalisation", "True": "with input normalisation"}
        parts = {inputs[kind]: [row for row in rows if row["input_norm"] == kind] for kind in inputs}
    for name, part in parts.items():
        if part:
            baseline, *arms = by_arm(part, "test_acc").items()
            comparisons = compare(baseline[1], dict(arms), "greater")
            validation = {arm: statistics.fmean(scores.values()) for arm, scores in by_arm(part, "val_acc").items()}
            yield Family(grid, part[0], name, baseline[1], comparisons, validation, None if ablation else choose(part))


KINDS: dict[str, tuple[Sequence[str], Callable[[Family], Sequence[str]]]] = {
    "digits": (("Input norm",), lambda family: [family.name.split()[0]]),
    "fashion-mnist": (
        ("Images", "Epochs"),
        lambda family: [f"{family.first['train_images']:,}", str(family.first["epochs"])],
    ),
    "ablation": (("Scale",), lambda family: [family.name.split()[1]]),
}
"""The tables by what names of their files start with: their first columns, and a family's cells there."""


def tables(families: Sequence[Family]) -> dict[str, str]:
    """Return the tables of the page by name, as Markdown; none where there are no runs."""
    found: dict[str, str] = {}
    for kind, (columns, cells) in KINDS.items():
        rows = [[*cells(family), *row] for family in families if family.grid.startswith(kind) for row in _rows(family)]
        head = [[*columns, "Arm", *HEADER], ["---"] * (len(columns) + 1) + ["--:"] * len(HEADER)]
        if rows:
            found[kind] = "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])
    return found


def _rows(family: Family) -> Iterator[list[str]]:
    n = len(family.baseline)
    scores = list(family.baseline.values())
    yield ["baseline", *_means(family, next(iter(family.validation)), scores), *[""] * 5]
    for comparison in family.comparisons:
        test = comparison.test
        low, high = test.confidence_interval
        name = comparison.label.removeprefix("input_").replace("_", " ").removeprefix(f"{family.name} ")
        yield [
            f"**{name}**" if comparison.label == family.chosen else name,
            *_means(family, comparison.label, comparison.proposed),
            f"{test.mean_difference:+.2f}",
            f"{low:+.2f} to {high:+.2f}",
            f"{least_detectable_effect(n, power=POWER) * test.std_difference:.2f}",
            f"{test.p_value:.2g}",
            f"{comparison.corrected:.2g}",
        ]


def _means(family: Family, arm: str, scores: Sequence[float]) -> list[str]:
    return [f"{family.validation[arm]:.2f}", f"{statistics.fmean(scores):.2f}", f"{statistics.stdev(scores):.2f}"]


def summary(families: Sequence[Family]) -> str:
    """Return one row an arm, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = "mean,std,mean_difference,ci_low,ci_high,d_z,least_detectable,p,p_wilcoxon,p_holm"
    writer.writerow(["grid", "family", "arm", "n", "chosen", "validation", *columns.split(",")])
    for family in families:
        n, (baseline, *_) = len(family.baseline), family.validation
        scores: Any = list(family.baseline.values())
        effect = least_detectable_effect(n, power=POWER)
        values: dict[str, list[float]] = {baseline: [statistics.fmean(scores), statistics.stdev(scores)]}
        for comparison in family.comparisons:
            test, scores = comparison.test, comparison.proposed
            values[comparison.label] = [
                statistics.fmean(scores),
                statistics.stdev(scores),
                test.mean_difference,
                *test.confidence_interval,
                test.effect_size,
                effect * test.std_difference,
                test.p_value,
                comparison.wilcoxon,
                comparison.corrected,
            ]
        for arm, numbers in values.items():
            start = [family.grid, family.name, arm, n, int(arm == family.chosen), f"{family.validation[arm]:.4f}"]
            cells = [f"{number:.4g}" if abs(number) < 10 else f"{number:.3f}" for number in numbers]
            writer.writerow([*start, *cells, *[""] * (len(columns.split(",")) - len(cells))])
    return text.getvalue()


def fill(page: str, found: dict[str, str]) -> str:
    """Return the page with its tables in place of those between the marks."""
    for name, table in found.items():
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = marked.subn(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", page)
        if count != 1:
            raise ValueError(f"{PAGE} has {count} places for the table {name!r}")
    return page


def main() -> None:
    """Write the page and the summary."""
    families = read_families(RUNS)
    PAGE.write_text(fill(PAGE.read_text(), tables(families)))
    (RUNS / SUMMARY).write_text(summary(families))


if __name__ == "__main__":
    main()
