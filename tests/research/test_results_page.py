"""The results page: its numbers are those of the runs beside it, and every planned grid is on it."""

from __future__ import annotations

import csv
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import collect
import gains_figure
import matplotlib.image
import numpy as np
import planned
import pytest
import results_page
from curves import Curve, write_curves
from helpers.scripts import ROOT
from scipy import stats

from lightning_revbn.callbacks.short_trainings import LOST_UP_TO
from lightning_revbn.runs.comparison import compare

GRIDS = [name for name in planned.GRIDS if (results_page.RESULTS / f"{name}.csv").is_file()]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_and_the_summary_are_what_the_command_writes() -> None:
    grids = results_page.read_all(results_page.RESULTS)
    page = results_page.PAGE.read_text()
    assert results_page.fill(page, results_page.tables(grids)) == page
    assert (results_page.RESULTS / results_page.SUMMARY).read_text() == results_page.summary(grids)


def test_every_planned_grid_is_on_the_page_and_no_file_is_left_out() -> None:
    page = results_page.PAGE.read_text()
    for name in planned.GRIDS:
        state = f"[{len(collect.runs_of(name))}](results/{name}.csv)" if name in GRIDS else "not run"
        assert f"| `{name}` |" in page
        assert state in next(line for line in page.splitlines() if f"| `{name}` |" in line)
    files = {path.name for path in results_page.RESULTS.glob("*.csv")}
    assert files == {f"{name}{end}.csv" for name in GRIDS for end in ("", "_curves")} | {results_page.SUMMARY}
    assert sum(path.stat().st_size for path in results_page.RESULTS.iterdir()) < 1_500_000


@pytest.mark.parametrize("name", GRIDS)
def test_every_run_of_a_grid_is_there_with_its_settings(name: str) -> None:
    expected = [(run.name, str(run.seed), str(run.settings.epochs)) for run in collect.runs_of(name)]
    rows = read(results_page.RESULTS / f"{name}.csv")
    assert [(row["arm"], row["seed"], row["epochs"]) for row in rows] == expected
    assert {row["arm"] for row in read(results_page.RESULTS / f"{name}_curves.csv")} == {row["arm"] for row in rows}


SEEDS = range(1, 16)
RANDOM = np.random.default_rng(0)
BEFORE = {seed: 97 + float(RANDOM.normal(0, 0.3)) for seed in SEEDS}
GAINS = {"scale_0.1": 0.5, "scale_0.25": -0.01, "input_batch_scale_0.1": -2.0, "input_batch_baseline": 0.3}
SETTINGS = {"scale_0.1": ("0.1", "none"), "scale_0.25": ("0.25", "none"), "input_batch_scale_0.1": ("0.1", "batch")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a made-up grid, named as the first planned."""
    folder = tmp_path_factory.mktemp("results")
    scores: dict[str, dict[int, float]] = {"baseline": BEFORE}
    for arm, gain in GAINS.items():
        scores[arm] = {seed: BEFORE[seed] + gain + float(RANDOM.normal(0, 0.1)) for seed in SEEDS}
    columns = ["arm", "scale", "scale_lr_divisor", "shift_lr_multiplier", "eps", "input_norm"]
    columns += ["seed", "val_acc", "test_acc", "best_test_acc"]
    with (folder / "digits.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for arm, values in scores.items():
            scale, kind = SETTINGS.get(arm, ("", "batch" if "input" in arm else "none"))
            for seed, score in values.items():
                writer.writerow([arm, scale, "100", "1", "", kind, seed, score - 1, score, score - 0.5])
    curves: dict[str, Curve] = {}
    for arm in scores:
        gain = (-3.0, GAINS.get(arm, 0.0))
        curves[arm] = Curve((7, 14), (1, 1), (1, 1), (90, 97), (90, 97), gain, (1, 1))
    write_curves(curves, folder / "digits_curves.csv")
    return folder


def test_an_arm_is_tested_against_its_own_baseline_with_scipys_numbers(folder: Path) -> None:
    found = {cell.arm: cell for cell in cells.read_cells(folder, "digits")}
    assert found["baseline"].comparison is None
    rows = read(folder / "digits.csv")
    tested: dict[str, float] = {}
    for arm in GAINS:
        baseline = "input_batch_baseline" if arm == "input_batch_scale_0.1" else "baseline"
        after, before = ([float(row["test_acc"]) for row in rows if row["arm"] == name] for name in (arm, baseline))
        cell = found[arm]
        assert cell.comparison is not None
        expected: Any = stats.ttest_rel(after, before, alternative="greater")
        assert (cell.baseline, cell.comparison.test.p_value) == (baseline, pytest.approx(expected.pvalue))
        assert cell.comparison.test.mean_difference == pytest.approx(statistics.fmean(after) - statistics.fmean(before))
        shifted: Any = stats.ttest_rel([score + 0.2 for score in after], before, alternative="greater")
        assert cell.loss_excluded == pytest.approx(shifted.pvalue)
        assert cell.best_epoch == pytest.approx(statistics.fmean(after) - 0.5)
        tested[arm] = expected.pvalue
    # Three arms share the plain baseline; the other has one question of its own.
    ordered = sorted(tested[arm] for arm in ("scale_0.1", "scale_0.25", "input_batch_baseline"))
    smallest = min(tested, key=lambda arm: tested[arm])
    comparison, alone = found[smallest].comparison, found["input_batch_scale_0.1"].comparison
    assert comparison is not None
    assert alone is not None
    assert comparison.corrected == pytest.approx(3 * ordered[0])
    assert alone.corrected == pytest.approx(tested["input_batch_scale_0.1"])


def test_the_steps_of_the_curves_are_in_the_cells(folder: Path) -> None:
    found = {cell.arm: cell for cell in cells.read_cells(folder, "digits")}
    assert {arm: found[arm].overtakes for arm in GAINS} == {
        "scale_0.1": 14,
        "scale_0.25": None,
        "input_batch_scale_0.1": None,
        "input_batch_baseline": 14,
    }
    assert found["scale_0.1"].relative_time == 1


def test_a_grid_without_runs_says_so_and_an_arm_has_its_worst_and_best_cell(folder: Path) -> None:
    grids = results_page.read_all(folder)
    assert [name for name in grids if grids[name]] == ["digits"]
    found = results_page.tables(grids)
    assert "**mnist1d 20**: not run" in found["mnist1d"]
    assert "| `digits_torch` | 4 | 15 | not run |" in found["planned"]
    rows = {line.split("|")[1].strip(): line for line in found["arms"].splitlines()}
    assert rows["scale 0.1"].endswith("| not everywhere |")
    assert rows["input batch scale 0.1"].endswith("| no |")
    lost = next(cell for cell in grids["digits"] if cell.arm == "input_batch_scale_0.1")
    gained = next(cell for cell in grids["digits"] if cell.arm == "scale_0.1")
    elsewhere = replace(lost, grid="mnist1d_20", arm="scale_0.1")
    both = results_page.tables({**grids, "mnist1d_20": [elsewhere]})["arms"]
    row = next(line for line in both.splitlines() if line.startswith("| scale 0.1 |"))
    assert f"| mnist1d 20 | {lost.difference:+.2f} | digits | {gained.difference:+.2f} | 2 | 1 |" in row


def test_a_setting_is_safe_that_gains_on_digits_and_loses_on_no_data_set(folder: Path) -> None:
    found = {cell.arm: cell for cell in cells.read_cells(folder, "digits")}
    gain, loss = found["scale_0.1"], found["input_batch_scale_0.1"]
    elsewhere = [replace(gain, grid=name) for name in ("mnist1d_100", "fashion-mnist_2000_10")]
    assert results_page.judge([gain, *elsewhere]) == "yes"
    assert results_page.judge([gain, *elsewhere, replace(loss, grid="mnist1d_20")]) == "no"
    assert results_page.judge([found["scale_0.25"], *elsewhere]) == "no"
    assert results_page.judge([gain, elsewhere[0]]) == "not everywhere"
    assert results_page.judge([gain, replace(loss, grid="mnist1d_20")]) == "no"


def test_equal_differences_exclude_a_loss_by_what_they_are(folder: Path) -> None:
    cell = next(cell for cell in cells.read_cells(folder, "digits") if cell.arm == "scale_0.1")
    for gain, p_value in ((-0.1, 0.0), (-0.25, 1.0)):
        proposed = {seed: score + gain for seed, score in BEFORE.items()}
        (comparison,) = compare(BEFORE, {"scale_0.1": proposed}, "greater")
        assert replace(cell, comparison=comparison).loss_excluded == p_value


def test_a_figure_is_small_and_shows_the_arms(folder: Path) -> None:
    (picture,) = gains_figure.draw_gains(folder, ["digits"])
    assert picture == folder / "digits.png"
    assert picture.stat().st_size < 300_000
    assert np.ptp(matplotlib.image.imread(picture)) > 0.9


def test_a_page_without_a_place_for_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="has 0 places for the table 'digits'"):
        results_page.fill("nothing", {"digits": "| 1 |"})


def test_the_callback_tells_of_the_trainings_that_all_lost() -> None:
    ended: dict[float, list[tuple[int, bool]]] = {}
    for name in GRIDS:
        steps = max(int(row["step"]) for row in read(results_page.RESULTS / f"{name}_curves.csv"))
        for cell in cells.read_cells(results_page.RESULTS, name):
            if cell.baseline == "baseline" and cell.arm.removeprefix("scale_").replace(".", "").isdecimal():
                assert cell.comparison is not None
                lost = cell.comparison.test.confidence_interval[1] < 0
                ended.setdefault(float(cell.arm.removeprefix("scale_")), []).append((steps, lost))
    longest: dict[float, int] = {}
    for scale, found in ended.items():
        others = min((steps for steps, lost in found if not lost), default=float("inf"))
        before = [steps for steps, _ in found if steps < others]
        longest |= {scale: max(before)} if before else {}
    assert longest == LOST_UP_TO
    for page, scales in (("choosing_settings", (0.1, 0.25)), ("first_run", (0.1,))):
        text = " ".join((ROOT / "docs" / f"{page}.md").read_text().split())
        assert all(f"up to {LOST_UP_TO[scale]} steps" in text for scale in scales), page
