"""What curves say, on curves made up for the purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import curves
import pytest
from curves import Curve


@pytest.mark.parametrize(
    ("gain", "step"),
    [
        ([-3.0, -1.0, 0.2, 0.1], 30),
        ([-3.0, 0.5, -0.1, 0.1], 40),
        ([0.1, 0.2, 0.1, 0.3], 10),
        ([-3.0, 1.0, 1.0, 0.0], None),
        ([-3.0, -2.0, -1.0, -0.5], None),
    ],
)
def test_an_arm_overtakes_for_good_when_it_stays_above(gain: list[float], step: int | None) -> None:
    assert curves.overtaking_step([10, 20, 30, 40], gain) == step


def curve(val_acc: list[float]) -> Curve:
    zeros = (0.0,) * len(val_acc)
    return Curve(tuple(range(10, 10 * len(val_acc) + 1, 10)), zeros, zeros, tuple(val_acc), zeros, zeros, zeros)


@pytest.mark.parametrize(
    ("arm", "ratio"),
    [([50.0, 90.0, 80.0, 95.0], 0.5), ([10.0, 20.0, 80.0, 90.0], 1.0), ([10.0, 20.0, 30.0, 89.9], None)],
)
def test_time_to_accuracy_is_relative_to_the_baselines_own(arm: list[float], ratio: float | None) -> None:
    baseline = curve([50.0, 80.0, 85.0, 90.0])  # is there after 40 steps
    assert curves.relative_time(curve(arm), baseline) == ratio


def test_a_baseline_that_falls_back_at_the_end_is_timed_by_where_it_first_was() -> None:
    baseline = curve([50.0, 91.0, 92.0, 90.0])
    assert curves.relative_time(baseline, baseline) == 1
    assert curves.relative_time(curve([90.0, 0.0, 0.0, 0.0]), baseline) == 0.5


def test_means_and_gains_are_over_the_same_seeds_and_survive_the_file(tmp_path: Path) -> None:
    accuracies = {"baseline": {1: [0.5, 0.8], 2: [0.7, 0.9]}, "scale_0.1": {1: [0.1, 0.9], 2: [0.2, 0.96]}}
    results: list[dict[str, Any]] = []
    for name, seeds in accuracies.items():
        for seed, values in seeds.items():
            folder = tmp_path / name / f"seed_{seed:02}"
            folder.mkdir(parents=True)
            rows = [f"{i},{7 * i},{i},{2 * i},0.{i},3,{value}" for i, value in enumerate(values, start=1)]
            lines = ["epoch,step,train_loss,val_loss,val_acc,test_loss,test_acc", *rows]
            (folder / "metrics.csv").write_text("\n".join(lines))
            arm = {"scale": None if name == "baseline" else 0.1}
            results.append({"name": name, "seed": seed, "arm": arm})
    found = curves.mean_curves(results, tmp_path)
    assert found["scale_0.1"].steps == (7, 14)
    assert found["scale_0.1"].train_loss == (1, 2)
    assert found["scale_0.1"].val_acc == pytest.approx((10, 20))
    assert found["scale_0.1"].test_acc == pytest.approx((15, 93))
    assert found["scale_0.1"].gain == pytest.approx((-45, 8))
    assert found["scale_0.1"].gain_std == pytest.approx((50**0.5, 8**0.5))  # of -40 and -50, of 10 and 6
    assert found["baseline"].gain == (0, 0)
    curves.write_curves(found, tmp_path / "curves.csv")
    again = curves.read_curves(tmp_path / "curves.csv")
    assert again.keys() == found.keys()
    for name, curve in found.items():
        for column in ("steps", *curves.COLUMNS[2:]):
            assert getattr(again[name], column) == pytest.approx(getattr(curve, column), rel=5e-3, abs=1e-9)
