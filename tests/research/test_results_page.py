"""The results page: its numbers are those of the runs beside it, and every run of a grid is there."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import results_page
from scipy import stats

GRIDS = sorted(path for path in results_page.RUNS.glob("*.csv") if path.name != results_page.SUMMARY)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_and_the_summary_are_what_the_command_writes() -> None:
    families = results_page.read_families(results_page.RUNS)
    page = results_page.PAGE.read_text()
    assert results_page.fill(page, results_page.tables(families)) == page
    assert (results_page.RUNS / results_page.SUMMARY).read_text() == results_page.summary(families)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_arm_has_every_seed_and_the_page_names_the_command(path: Path) -> None:
    arms: dict[str, list[int]] = {}
    for row in read(path):
        arms.setdefault(row["arm"], []).append(int(row["seed"]))
    assert set(map(tuple, arms.values())) in ({tuple(range(1, 16))}, {tuple(range(1, 9))})
    assert f"results/{path.name})" in results_page.PAGE.read_text()


def summarised() -> Iterator[tuple[dict[str, str], dict[str, Any], dict[str, list[float]]]]:
    """Yield the rows of the summary, with scipy's answer and the test scores of the file by arm."""
    for row in read(results_page.RUNS / results_page.SUMMARY):
        scores: dict[str, list[float]] = {}
        for run in read(results_page.RUNS / f"{row['grid']}.csv"):
            scores.setdefault(run["arm"], []).append(float(run["test_acc"]))
        before = scores["input_baseline" if row["arm"].startswith("input_") else "baseline"]
        after = scores[row["arm"]]
        found: dict[str, Any] = {"mean": statistics.fmean(after), "std": statistics.stdev(after)}
        if row["p"]:
            test: Any = stats.ttest_rel(after, before, alternative="greater")
            low, high = stats.ttest_rel(after, before).confidence_interval()  # type: ignore[attr-defined]
            found |= {"p": test.pvalue, "ci_low": low, "ci_high": high, "mean_difference": (low + high) / 2}
        yield row, found, scores


def test_the_numbers_of_the_summary_are_scipys() -> None:
    tested = 0
    for row, found, scores in summarised():
        assert int(row["n"]) == len(scores[row["arm"]])
        for name, value in found.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-3, abs=1e-12), (row["grid"], row["arm"], name)
        tested += bool(row["p"])
    assert tested >= 5 * len(GRIDS)


def test_the_scale_in_bold_is_the_best_on_validation_data() -> None:
    arms: dict[tuple[str, str], dict[str, float]] = {}
    chosen: dict[tuple[str, str], str] = {}
    for row in read(results_page.RUNS / results_page.SUMMARY):
        if row["p"] and not row["grid"].startswith("ablation"):
            arms.setdefault((row["grid"], row["family"]), {})[row["arm"]] = float(row["validation"])
        if row["chosen"] == "1":
            chosen[row["grid"], row["family"]] = row["arm"]
    assert arms.keys() == chosen.keys()
    assert all(validation[chosen[key]] == max(validation.values()) for key, validation in arms.items())


def test_a_page_without_a_place_for_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="has 0 places for the table 'digits'"):
        results_page.fill("nothing", {"digits": "| 1 |"})
