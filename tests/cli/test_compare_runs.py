"""`lightning-revbn compare`: its options, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.arms import BASELINE, BETTER, WORSE, end_early, remove_seed, write_arm
from helpers.logs import write_csv

from lightning_revbn.cli.main import main


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = compare(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


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


def test_an_arm_in_a_directory_called_baseline_has_a_name_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = write_arm(tmp_path / "a" / "baseline", BASELINE), write_arm(tmp_path / "x" / "baseline", BETTER)
    options = arms[0], "--against", arms[1], "--metric", "test_acc"
    _, out, _ = compare(capsys, *options)
    assert [line.partition(" ")[0] for line in out.splitlines()[2:4]] == ["baseline", "x/baseline"]
    code, _, err = compare(capsys, *options, "--labels", "baseline")
    assert code == 1
    assert "two arms are called baseline: name them by --labels" in err


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


def test_runs_that_are_no_pairs_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = write_arm(tmp_path / "a", BASELINE), write_arm(tmp_path / "b", BETTER)
    remove_seed(arms[1])
    code, out, err = compare(capsys, arms[0], "--against", arms[1], "--metric", "test_acc")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "seed 3 of baseline has no partner in b" in err


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
        (["--seed-pattern", "("], "is not a regular expression"),
        (["--seed-pattern", "(a{99999999999})"], "is not a regular expression: the repetition number is too large"),
        (["--seed-pattern", "(" * 5000 + ")" * 5000], "is not a regular expression: maximum recursion depth"),
        (["--seed-pattern", "run"], "must have a group"),
        (["--seed-pattern", "(nowhere)"], "finds nothing in"),
        (["--seed-pattern", "(see)"], "finds no number in"),
        (["-o", "pairs.txt"], "must end in any of .png, .svg, .pdf"),
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
    assert "a single pair tells nothing about chance" in err


def test_what_is_missing_of_a_log_is_told_since_an_earlier_score_may_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [write_arm(tmp_path / name, scores) for name, scores in (("a", BASELINE), ("b", BETTER))]
    for run in arms[1].iterdir():
        write_csv(run, [(20, {"test_acc": 0.5}), (20, {"test_acc": 0.9})])
        content = (run / "metrics.csv").read_bytes()
        (run / "metrics.csv").write_bytes(content[:-3])
    code, out, err = compare(capsys, arms[0], "--against", arms[1], "--metric", "test_acc")
    assert code == 0
    assert "| 0.5 " in out
    said = err.splitlines()
    assert len(said) == 6
    assert all("metrics.csv: ends in the middle of a line, which was left out" in line for line in said[:5])
    assert said[5] == "lightning-revbn: more warnings of damaged logs: 1"


def test_labels_are_never_cut_and_the_figures_p_is_that_of_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [write_arm(tmp_path / name, scores) for name, scores in (("a", BASELINE), ("b", BETTER), ("c", WORSE))]
    labels = [f"{'x' * 300}{end}{'x' * 300}" for end in "bc"]
    file = tmp_path / "pairs.svg"
    options = "--against", arms[1], "--against", arms[2], "--metric", "test_acc", "--labels", *labels, "-o", file
    code, out, _ = compare(capsys, arms[0], *options)
    assert code == 0
    assert [out.count(label) for label in labels] == [2, 2]
    assert file.read_text().count("p (Holm) = ") == 2


def test_more_arms_than_a_figure_shows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = [write_arm(tmp_path / str(number), BASELINE[:2]) for number in range(26)]
    options = [option for arm in arms[1:] for option in ("--against", arm)]
    code, out, err = compare(capsys, arms[0], *options, "--metric", "test_acc", "-o", tmp_path / "pairs.png")
    assert (code, out) == (1, "")
    assert err == "lightning-revbn: 25 arms were found, and a figure shows no more than 24: name the runs of fewer\n"


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


def test_a_comparison_in_both_directions_takes_few_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = write_arm(tmp_path / "a", BASELINE[:4]), write_arm(tmp_path / "b", BETTER[:4])
    options = [arms[0], "--against", arms[1], "--metric", "test_acc", "--direction", "two-sided"]
    assert as_json(capsys, *options)["arms"][0]["least_detectable_difference"] > 0
    arms = write_arm(tmp_path / "c", BASELINE[:2]), write_arm(tmp_path / "d", BETTER[:2])
    code, out, err = compare(capsys, arms[0], "--against", arms[1], "--metric", "test_acc", "--alpha", "1e-9")
    assert (code, out) == (1, "")
    assert (
        err
        == "lightning-revbn: --alpha 1e-09: level=1e-09 is too small for n=2 pairs: scipy cannot compute the effect\n"
    )
