"""A study on Ray and on the other launchers, by `make study`: Ray's launcher needs a cloudpickle that others refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.studies import compared, results, run_study

pytestmark = pytest.mark.study

TWO_ARMS_FIVE_SEEDS = ("revbn=off,default", "seed=range(1,6)", "trainer.max_epochs=1", "hydra.sweeper.max_batch_size=5")


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "basic"
    run_study(folder, *TWO_ARMS_FIVE_SEEDS)
    return folder


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_two_arms_with_five_seeds_have_the_scores_and_the_table_of_one_process(
    launcher: str, in_one_process: Path, tmp_path: Path
) -> None:
    run_study(tmp_path, f"hydra/launcher={launcher}", *TWO_ARMS_FIVE_SEEDS)
    assert len(results(tmp_path)) == 10
    assert results(tmp_path) == results(in_one_process)
    assert compared(tmp_path) == compared(in_one_process)


def test_a_failed_run_on_ray_stops_no_other_run(tmp_path: Path) -> None:
    options = ["hydra/launcher=ray", "revbn=default", "revbn.scale=0,0.5", "trainer.max_epochs=1"]
    done = run_study(tmp_path, *options, check=False)
    assert done.returncode == 1
    assert len(results(tmp_path)) == 1
    assert "1 runs finished, 1 failed" in done.stderr
    assert "ValueError: scale=0 must be finite and positive" in done.stderr
