from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_revbn.runs.curves import ahead_for_good, clear_for_good, compare_curves, conclude
from lightning_revbn.runs.finished_runs import FinishedRun
from lightning_revbn.runs.scalars import LogError, Series


def arm(*curves: Sequence[float], steps: Sequence[int] = (0, 10, 20, 30)) -> dict[int, FinishedRun]:
    """Runs of seeds 0, 1, ... with these values."""
    return {
        seed: FinishedRun(Path("run"), seed, 0.0, 30, Series(np.array(steps[: len(values)]), np.array(values)))
        for seed, values in enumerate(curves)
    }


BASELINE = arm([4, 3, 2, 2.0], [4, 3.5, 2.5, 2.2], [4.1, 3.2, 2.2, 2.1])
BETTER = arm([5, 2.9, 1.5, 1.0], [5.2, 3.6, 1.9, 1.3], [5.3, 2.9, 1.6, 1.2])


def test_means_and_intervals_equal_scipys_at_every_step() -> None:
    found = compare_curves(BASELINE, BETTER, "b", "loss")
    before, after = (np.stack([run.curve.values for run in runs.values() if run.curve]) for runs in (BASELINE, BETTER))
    for band, values in ((found.baseline, before), (found.proposed, after), (found.difference, after - before)):
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        np.testing.assert_allclose(band.mean, values.mean(0))
        np.testing.assert_allclose([band.low, band.high], [expected.low, expected.high])


def test_an_arm_is_ahead_from_the_step_after_the_last_at_which_it_was_not() -> None:
    found = compare_curves(BASELINE, BETTER, "b", "loss")
    assert ahead_for_good(found, lower_is_better=True) == 10
    assert clear_for_good(found, lower_is_better=True) == 20  # at step 10 one pair is behind
    assert ahead_for_good(found, lower_is_better=False) is None
    assert conclude(found, "loss", lower_is_better=True) == (
        "b: ahead for good from step 10 of 30 (lower loss; mean of 3 pairs); the 95 % interval of the "
        "difference stays clear of 0 from step 20 on"
    )
    assert "b: not ahead at the last step, 30 (higher loss is ahead" in conclude(found, "loss", lower_is_better=False)


def test_only_steps_that_all_runs_logged_are_compared() -> None:
    shorter = arm([5, 2.9], [5, 3.6], [5.1, 2.9], steps=(10, 30))
    assert compare_curves(BASELINE, shorter, "b", "loss").steps.tolist() == [10, 30]
    with pytest.raises(LogError, match="of b logged loss at no step in common"):
        compare_curves(BASELINE, arm([1], [1], [1], steps=(5,)), "b", "loss")


def test_an_arm_of_which_a_run_diverged_is_not_ahead() -> None:
    diverged = arm([3, 2, 1, math.nan], [3, 2, 1, 1], [3, 2, 1, math.inf])
    found = compare_curves(BASELINE, diverged, "b", "loss")
    assert np.isnan(found.difference.mean).tolist() == [False, False, False, True]
    assert ahead_for_good(found, lower_is_better=True) is None
    assert conclude(found, "loss", lower_is_better=True) == (
        "b: no mean difference at the last step, 30: not every run has a finite loss in this arm from step 30 on"
    )


def test_an_arm_is_not_called_behind_a_baseline_of_which_a_run_diverged() -> None:
    diverged = arm([4, 3, 2, 2.0], [4, 3.5, math.nan, math.nan], [4.1, 3.2, 2.2, 2.1])
    found = compare_curves(diverged, BETTER, "b", "loss")
    assert conclude(found, "loss", lower_is_better=True) == (
        "b: no mean difference at the last step, 30: not every run has a finite loss in the baseline from step 20 on"
    )
