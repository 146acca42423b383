from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lightning_revbn.callbacks.revisited import RevisitedBatchNorm
from lightning_revbn.core.setting_keys import BASELINE_SETTINGS
from lightning_revbn.runs.arms import confounders, sort_runs
from lightning_revbn.runs.finished_runs import FinishedRun, by_seed
from lightning_revbn.runs.scalars import LogError

NEUTRAL = {f"revbn/{name}": value for name, value in BASELINE_SETTINGS.items() if not isinstance(value, list)}


def run(seed: int = 1, **hyperparameters: Any) -> FinishedRun:
    settings = {name.replace("revbn_", "revbn/", 1): value for name, value in hyperparameters.items()}
    return FinishedRun(Path(f"run_{seed}"), seed, math.nan, 10, hyperparameters=settings)


def labels(*runs: FinishedRun) -> list[str]:
    return [arm.label for arm in sort_runs(runs)]


def test_a_baselines_settings_are_those_of_the_callback_by_name() -> None:
    assert BASELINE_SETTINGS.keys() == RevisitedBatchNorm()._settings.keys()


def test_a_baseline_has_no_settings_or_those_with_which_nothing_changes() -> None:
    neutral = FinishedRun(Path("b"), 2, math.nan, 10, hyperparameters={**NEUTRAL, "revbn/seed": 2, "lr": 0.1})
    baseline, arm = sort_runs([run(1, lr=0.1), neutral, run(1, revbn_scale=0.1)])
    assert [one.seed for one in baseline.runs] == [1, 2]
    assert arm.label == "scale=0.1"


def test_arms_are_called_by_the_settings_in_which_they_differ_and_sorted_by_their_values() -> None:
    common = {"revbn_scale_lr_divisor": 100.0}
    runs = [run(revbn_scale=scale, **common) for scale in (0.5, 0.1, 0.25)]
    assert labels(run(), *runs) == ["baseline", "scale=0.1", "scale=0.25", "scale=0.5"]
    fast = run(revbn_scale=0.1, revbn_shift_lr_multiplier=10.0, **common)
    assert labels(run(), runs[1], fast) == [
        "baseline",
        "scale=0.1, shift_lr_multiplier=1",
        "scale=0.1, shift_lr_multiplier=10",
    ]
    patterns = run(revbn_scale='{"*": 0.3}', **common)
    assert labels(run(), patterns, runs[0]) == ["baseline", "scale=0.5", 'scale={"*": 0.3}']


def test_a_log_of_an_older_version_without_a_setting_belongs_to_the_arm_of_its_neutral_value() -> None:
    older = run(1, revbn_scale=0.1, revbn_scale_lr_divisor=100.0)
    newer = run(2, revbn_scale=0.1, revbn_scale_lr_divisor=100.0, revbn_shift_lr_multiplier=1.0, revbn_eps=None)
    assert labels(run(), older, newer) == ["baseline", "scale=0.1"]


def test_without_a_baseline_or_without_an_arm_the_remedy_is_told() -> None:
    with pytest.raises(LogError, match=r"2 runs and no baseline .* all were revisited \(scale=0.1, scale=0.5\)"):
        sort_runs([run(revbn_scale=0.1), run(revbn_scale=0.5)])
    with pytest.raises(LogError, match=r"1 run and no settings of RevisitedBatchNorm .* name the arms by: compare"):
        sort_runs([run()])


def test_a_run_whose_settings_cannot_be_read_is_no_baseline() -> None:
    damaged = FinishedRun(Path("d"), 2, math.nan, 10, unread="d/hparams.yaml cannot be read: it is damaged")
    with pytest.raises(LogError, match=r"d/hparams\.yaml cannot be read: it is damaged: without its hyperparameters"):
        sort_runs([run(1), damaged, run(1, revbn_scale=0.1)])


def test_what_else_differs_in_every_pair_is_found_and_what_differs_in_some_is_not() -> None:
    baseline = by_seed([run(seed, lr=0.1, width=seed, revbn_scale=1.0) for seed in (1, 2)])
    proposed = by_seed([run(seed, lr=0.2, width=1, revbn_scale=0.1) for seed in (1, 2)])
    assert confounders(baseline, proposed) == ["lr"]
    assert confounders(baseline, baseline) == []
