"""Arms from their settings: what they are called, what the callback gets, and with what they are compared."""

from __future__ import annotations

import arms
import planned
import pytest
from arms import Arm

from lightning_revbn import RevisitedBatchNorm


@pytest.mark.parametrize(
    ("text", "expected", "name"),
    [
        ("baseline", Arm(), "baseline"),
        ("scale=0.1", Arm(0.1, 100, 1, None), "scale_0.1"),
        ("scale=1", Arm(1, 100, 1, None), "scale_1"),
        ("scale=0.5,scale_lr_divisor=10", Arm(0.5, 10, 1, None), "scale_0.5_divisor_10"),
        ("scale=1, scale_lr_divisor=1, shift_lr_multiplier=10", Arm(1, 1, 10, None), "shifts_x10"),
        ("eps=1e-3,scale_lr_divisor=1,scale=1", Arm(1, 1, 1, 1e-3), "eps_0.001"),
        ("scale=0.25,eps=1e-3,shift_lr_multiplier=3", Arm(0.25, 100, 3, 1e-3), "scale_0.25_eps_0.001_shifts_x3"),
        ("scale=1,scale_lr_divisor=1", Arm(1, 1, 1, None), "neutral"),
        ("input_norm=true", Arm(input_norm="batch"), "input_batch_baseline"),
        ("input_norm=false", Arm(), "baseline"),
        ("scale=0.1,input_norm=dataset", Arm(0.1, input_norm="dataset"), "input_dataset_scale_0.1"),
    ],
)
def test_an_arm_is_its_settings_and_named_by_them(text: str, expected: Arm, name: str) -> None:
    arm = arms.parse_arm(text)
    assert arm == expected
    assert arm.name == name
    callbacks = arm.callbacks()
    if arm.scale is None:
        assert callbacks == []
    else:
        (callback,) = callbacks
        assert isinstance(callback, RevisitedBatchNorm)
        found = (callback.scale, callback.scale_lr_divisor, callback.shift_lr_multiplier, callback.eps)
        assert found == (arm.scale, arm.scale_lr_divisor, arm.shift_lr_multiplier, arm.eps)
        assert callback.monitor is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gamma=0.1", "'gamma=0.1' is no setting; use baseline or scale, scale_lr_divisor"),
        ("scale", "'scale' is no setting"),
        ("scale=big", "scale='big' is no number"),
        ("scale=0.1,scale=0.2", "scale is there twice"),
        ("scale=-1", "must be finite and positive"),
        ("eps=1e-3", "say which scale, scale=1,scale_lr_divisor=1 to leave scales alone"),
        ("input_norm=layer", "input_norm='layer' is unknown"),
    ],
)
def test_settings_that_are_wrong_are_refused_with_their_arm(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^arm {text!r}: .*{message}"):
        arms.parse_arm(text)


def test_an_arm_is_compared_with_the_same_input_and_another_input_with_the_baseline() -> None:
    names = {
        "scale=0.1": "baseline",
        "scale=0.1,input_norm=batch": "input_batch_baseline",
        "input_norm=batch": "baseline",
    }
    assert {text: arms.reference(arms.parse_arm(text)).name for text in names} == names


def test_every_planned_grid_can_be_run_and_no_two_of_its_arms_share_a_name() -> None:
    from collect import runs_of

    for grid in planned.GRIDS:
        runs = runs_of(grid)
        names = {run.name for run in runs}
        assert len({(run.name, run.seed) for run in runs}) == len(runs)
        assert len(runs) == len(names) * max(run.seed for run in runs)
        assert "baseline" in names
