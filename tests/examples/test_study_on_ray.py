"""A study on Ray: its launcher for Hydra needs a version of cloudpickle that newer packages refuse, so `make study`."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.studies import ARMS_AND_SEEDS, compared, results, run_study

pytestmark = pytest.mark.study


def test_ray_gives_the_scores_and_the_table_of_one_process(tmp_path: Path) -> None:
    for launcher in ("basic", "ray"):
        run_study(tmp_path / launcher, f"hydra/launcher={launcher}", *ARMS_AND_SEEDS)
    assert len(results(tmp_path / "ray")) == 4
    assert results(tmp_path / "ray") == results(tmp_path / "basic")
    assert compared(tmp_path / "ray") == compared(tmp_path / "basic")


def test_a_failed_run_on_ray_stops_no_other_run(tmp_path: Path) -> None:
    options = ["hydra/launcher=ray", "revbn=default", "revbn.scale=0,0.5", "trainer.max_epochs=1"]
    done = run_study(tmp_path, *options, check=False)
    assert done.returncode == 1
    assert len(results(tmp_path)) == 1
    assert "1 runs finished, 1 failed" in done.stderr
    assert "ValueError: scale=0 must be finite and positive" in done.stderr
