"""What is said at the start of a training that is shorter than all that gained in our results."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from helpers.lit import LitNet, loader, trainer
from helpers.models import images
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_revbn import RevisitedBatchNorm
from lightning_revbn.callbacks.short_trainings import LOST_UP_TO

STEPS = LOST_UP_TO[0.1]


def said(
    path: Path,
    caplog: pytest.LogCaptureFixture,
    callback: RevisitedBatchNorm,
    data: Any = None,
    *others: L.Callback,
    **options: Any,
) -> list[str]:
    """Start a training, stop it before the first update, and return the lines about its length."""
    caplog.clear()
    module = LitNet()
    module.on_train_batch_start = lambda *args: -1  # type: ignore[method-assign] # Lightning's way to skip an epoch
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer(path, callback, *others, **options).fit(module, loader(2) if data is None else data)
    return [record.getMessage() for record in caplog.records if "ended below its baseline" in record.getMessage()]


def test_one_line_names_the_steps_the_scale_and_the_page(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (line,) = said(tmp_path, caplog, RevisitedBatchNorm(), max_epochs=STEPS // 2)
    assert line == (
        f"RevisitedBatchNorm: this training has {STEPS} optimizer steps. In our results every training of up to "
        f"{STEPS} steps from scale 0.1 ended below its baseline: see docs/results.md"
    )
    assert "\n" not in line


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"max_epochs": STEPS // 2 + 1}),
        ({}, {"max_epochs": -1}),
        ({}, {"max_epochs": 1, "fast_dev_run": 2}),
        ({"scale": 0.05}, {"max_epochs": 1}),
        ({"scale": {"*.stem.*": 0.1, "*": 0.25}}, {"max_epochs": 1}),
        ({"scale_lr_divisor": 10}, {"max_epochs": 1}),
        ({"shift_lr_multiplier": 10}, {"max_epochs": 1}),
        ({"eps": 1e-3}, {"max_epochs": 1}),
        ({"scale": 1, "scale_lr_divisor": 1, "shift_lr_multiplier": 10}, {"max_epochs": 1}),
        ({"enabled": False}, {"max_epochs": 1}),
    ],
    ids=str,
)
def test_nothing_is_said_of_what_the_results_do_not_have(
    settings: dict[str, Any], options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if options["max_epochs"] == -1:
        options = {"max_epochs": -1, "max_time": {"seconds": 0}}
    assert not said(tmp_path, caplog, RevisitedBatchNorm(**settings), **options)


class Stream(IterableDataset[Any]):
    """Samples without end and without a length."""

    def __iter__(self) -> Iterator[Any]:
        x, y = images(8)
        while True:
            yield from zip(x, y, strict=True)


def test_nothing_is_said_where_the_steps_are_not_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = DataLoader(Stream(), batch_size=4)
    assert not said(tmp_path, caplog, RevisitedBatchNorm(), stream, max_epochs=1)
    schedule = GradientAccumulationScheduler({0: 4, 1: 1})
    assert not said(tmp_path, caplog, RevisitedBatchNorm(), None, schedule, max_epochs=2)


def test_accumulated_batches_are_one_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (line,) = said(tmp_path, caplog, RevisitedBatchNorm(), max_epochs=STEPS, accumulate_grad_batches=2)
    assert f"has {STEPS} optimizer steps" in line


def test_a_resumed_training_is_not_told_again(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    first = trainer(tmp_path, RevisitedBatchNorm(), max_epochs=1)
    first.fit(LitNet(), loader(2))
    first.save_checkpoint(tmp_path / "end.ckpt")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        resumed = trainer(tmp_path, RevisitedBatchNorm(), max_epochs=2)
        resumed.fit(LitNet(), loader(2), ckpt_path=tmp_path / "end.ckpt")
    assert "ended below its baseline" not in caplog.text
