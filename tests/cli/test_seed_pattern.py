"""--seed-pattern: what no search comes to an end with."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from helpers.arms import BASELINE, BETTER, write_arm

from lightning_revbn.cli import seed_pattern
from lightning_revbn.cli.main import main
from lightning_revbn.cli.seed_pattern import SeedPatternError, check_time, parse_seed_pattern

ENDLESS = "((a+)+)$"


def test_a_pattern_that_takes_too_long_is_refused() -> None:
    begun = time.monotonic()
    with pytest.raises(SeedPatternError, match=r"takes more than 0\.5 seconds for 1 paths: write it without a repetit"):
        check_time(parse_seed_pattern(ENDLESS), [Path("a" * 60 + "/seed_1")], longest=0.5)
    assert time.monotonic() - begun < 30


def test_a_pattern_may_search_paths_of_any_text() -> None:
    check_time(parse_seed_pattern(r"läuf[\d\n]_(\d+)"), [Path("läuf1_7\n'\""), Path("\udcff"), Path("x" * 5000)])


def test_compare_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seed_pattern.check_time, "__defaults__", (0.5,))
    arms = write_arm(tmp_path / ("a" * 60) / "one", BASELINE), write_arm(tmp_path / ("a" * 60) / "two", BETTER)
    options = [str(arms[0]), "--against", str(arms[1]), "--metric", "test_acc", "--seed-pattern", ENDLESS]
    assert main(["compare", *options]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"--seed-pattern {ENDLESS} takes more than 0.5 seconds for 12 paths" in err
