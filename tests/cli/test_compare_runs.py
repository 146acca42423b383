"""`lightning-revbn compare` on logs of both kinds of loggers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from scipy import stats
from test_logs import write_csv, write_events

from lightning_revbn.cli.main import main

BASELINE = [0.9722, 0.9733, 0.9711, 0.9744, 0.9700, 0.9755]
BETTER = [0.9788, 0.9733, 0.9766, 0.9800, 0.9777, 0.9744]
WORSE = [0.9700, 0.9701, 0.9688, 0.9722, 0.9611, 0.9700]


def write_arm(folder: Path, scores: Sequence[float], steps: int = 20) -> Path:
    """Write a run for every score, seeds from 1; training loss at two steps, the score at the end."""
    for seed, score in enumerate(scores, start=1):
        events = [(0, {"loss": 2.0}), (steps, {"loss": 1.0, "test_acc": score})]
        write_csv(folder / f"seed_{seed:02}", events)
    return folder


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = compare(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_every_number_is_scipys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = [write_arm(tmp_path / name, scores) for name, scores in (("a", BASELINE), ("b", BETTER), ("c", WORSE))]
    found = as_json(capsys, arms[0], "--against", arms[1], "--against", arms[2], "--metric", "test_acc")
    assert found["n"] == 6
    assert found["seeds"] == [1, 2, 3, 4, 5, 6]
    p_values = []
    for arm, scores in zip(found["arms"], (BETTER, WORSE), strict=True):
        assert arm["scores"] == scores
        t: Any = stats.ttest_rel(scores, BASELINE, alternative="greater")
        both: Any = stats.ttest_rel(scores, BASELINE)
        w: Any = stats.wilcoxon(scores, BASELINE, alternative="greater")
        differences = [after - before for after, before in zip(scores, BASELINE, strict=True)]
        assert arm["p_value"] == pytest.approx(t.pvalue, rel=1e-9)
        assert arm["statistic"] == pytest.approx(t.statistic, rel=1e-9)
        assert arm["wilcoxon_p_value"] == pytest.approx(w.pvalue, rel=1e-9)
        assert arm["confidence_interval"] == pytest.approx(list(both.confidence_interval(0.95)), rel=1e-9)
        assert arm["effect_size"] == pytest.approx(stats.tmean(differences) / stats.tstd(differences), rel=1e-9)
        p_values.append(t.pvalue)
    assert found["arms"][0]["holm_p_value"] == pytest.approx(2 * p_values[0], rel=1e-9)
    assert found["arms"][1]["holm_p_value"] == pytest.approx(p_values[1], rel=1e-9)


def test_the_table_says_what_is_shown_and_what_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = [write_arm(tmp_path / name, scores) for name, scores in (("base", BASELINE), ("b", BETTER), ("c", WORSE))]
    code, out, _ = compare(capsys, arms[0], "--against", arms[1], "--against", arms[2], "--metric", "test_acc")
    assert code == 0
    assert "test_acc of 6 pairs, paired t-test: proposed > baseline" in out
    assert "b: higher than the baseline, p = 0.0425" in out
    assert "c: no effect in the declared direction shown, p = 0.993. The difference is clearly in the other" in out
    assert "6 pairs find an effect of d_z = 1.19 in 80% of all experiments" in out
    assert "p (Holm) corrects for 2 arms" in out
    assert "too few" not in out
    code, out, _ = compare(capsys, arms[0], "--against", arms[2], "--metric", "test_acc", "--direction", "less")
    assert "c: lower than the baseline" in out
    assert "Holm" not in out


def test_few_pairs_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = write_arm(tmp_path / "a", BASELINE[:3]), write_arm(tmp_path / "b", BETTER[:3])
    _, out, _ = compare(capsys, arms[0], "--against", arms[1], "--metric", "test_acc")
    assert "Warning: 3 pairs are too few to say anything" in out


def test_equal_differences_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = write_arm(tmp_path / "a", BASELINE), write_arm(tmp_path / "b", [score + 0.01 for score in BASELINE])
    _, out, _ = compare(capsys, arms[0], "--against", arms[1], "--metric", "test_acc")
    assert "b: all differences are +0.01; a test can say nothing" in out
    found = as_json(capsys, arms[0], "--against", arms[1], "--metric", "test_acc")
    assert found["arms"][0]["p_value"] is None


def test_event_files_and_seeds_of_hyperparameters_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, score in enumerate(BASELINE):
        write_events(tmp_path / "events" / f"version_{index}", [(20, {"loss": 1.0, "test_acc": score})])
        (tmp_path / "events" / f"version_{index}" / "hparams.yaml").write_text(f"lr: 0.1\nseed: {index + 1}\n")
        logger = CSVLogger(tmp_path / "tables", name="", version=9 - index)  # in another order
        logger.log_hyperparams({"model": {"seed": index + 1}, "lr": 0.1})
        logger.log_metrics({"loss": 1.0, "test_acc": BETTER[index]}, step=20)
        logger.save()
    arms = tmp_path / "events", tmp_path / "tables"
    found = as_json(capsys, arms[0], "--against", arms[1], "--metric", "test_acc")
    assert found["arms"][0]["scores"] == BETTER
    assert found["baseline"]["scores"] == pytest.approx(BASELINE, rel=1e-6)  # event files hold float32


def test_a_pattern_finds_seeds_in_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arm, scores in (("a", BASELINE), ("b", BETTER)):
        for index, score in enumerate(scores):
            write_csv(tmp_path / arm / f"run{index}-seed7", [(20, {"test_acc": score})])
    options = tmp_path / "a", "--against", tmp_path / "b", "--metric", "test_acc"
    code, _, err = compare(capsys, *options)
    assert code == 1
    assert "seed 7 has two runs" in err
    found = as_json(capsys, *options, "--seed-pattern", r"run(\d+)")
    assert found["seeds"] == [0, 1, 2, 3, 4, 5]


def remove_seed(folder: Path) -> None:
    (folder / "seed_03" / "metrics.csv").unlink()


def end_in_nan(folder: Path) -> None:
    write_csv(folder / "seed_03", [(20, {"test_acc": math.nan})])


def end_early(folder: Path) -> None:
    write_csv(folder / "seed_03", [(10, {"test_acc": 0.9})])


def never_test(folder: Path) -> None:
    write_csv(folder / "seed_03", [(20, {"test_loss": 0.9})])


def run_twice(folder: Path) -> None:
    write_csv(folder / "again" / "seed_3", [(20, {"test_acc": 0.9})])


def lose_the_seed(folder: Path) -> None:
    write_csv(folder / "third", [(20, {"test_acc": 0.9})])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_seed, "seed 3 of baseline has no partner in b"),
        (end_in_nan, "seed_03 ends with test_acc=nan: a run that failed has no score to compare"),
        (end_early, "seed_03 ends at step 10, the longest run at 20: unfinished? Where runs stop by themselves"),
        (never_test, "seed_03 has no test_acc: unfinished, or logged by another name; it has test_loss"),
        (run_twice, "seed 3 has two runs"),
        (lose_the_seed, "is not known: there is no 'seed: N' in its hparams.yaml and no 'seed_N' in its path"),
    ],
)
def test_runs_that_are_no_pairs_are_refused_in_one_line(
    damage: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = write_arm(tmp_path / "a", BASELINE), write_arm(tmp_path / "b", BETTER)
    damage(arms[1])
    code, out, err = compare(capsys, arms[0], "--against", arms[1], "--metric", "test_acc")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err


def test_runs_that_stop_by_themselves_may_differ_in_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = write_arm(tmp_path / "a", BASELINE), write_arm(tmp_path / "b", BETTER)
    end_early(arms[1])
    found = as_json(capsys, arms[0], "--against", arms[1], "--metric", "test_acc", "--any-length")
    assert found["arms"][0]["scores"][2] == 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "0"], "--alpha 0.0 must be above 0"),
        (["--labels", "x", "y"], "--labels has 2 names for 1 arms"),
        (["--seed-pattern", "("], "is no regular expression"),
        (["--seed-pattern", "run"], "must have a group"),
        (["--seed-pattern", "(nowhere)"], "finds nothing in"),
        (["--seed-pattern", "(see)"], "finds no number in"),
        (["-o", "pairs.txt"], "must end in one of .png, .svg, .pdf"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = write_arm(tmp_path / "a", BASELINE), write_arm(tmp_path / "b", BETTER)
    code, out, err = compare(capsys, arms[0], "--against", arms[1], "--metric", "test_acc", *options)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err


def test_one_pair_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = write_arm(tmp_path / "a", BASELINE[:1]), write_arm(tmp_path / "b", BETTER[:1])
    code, _, err = compare(capsys, arms[0], "--against", arms[1], "--metric", "test_acc")
    assert code == 1
    assert "one pair tells nothing about chance" in err


def test_pairs_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = [write_arm(tmp_path / name, scores) for name, scores in (("a", BASELINE), ("b", BETTER), ("c", WORSE))]
    file = tmp_path / "pairs.svg"
    options = "--labels", "scale 0.1", "scale 0.5", "-o", file
    compare(capsys, arms[0], "--against", arms[1], "--against", arms[2], "--metric", "test_acc", *options)
    picture = file.read_text()
    assert picture.count("scale 0.1") + picture.count("scale 0.5") >= 2
    # Gains and losses have colours of their own.
    assert "#0072b2" in picture
    assert "#d55e00" in picture
