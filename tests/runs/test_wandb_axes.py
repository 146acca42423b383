"""Offline runs of W&B whose metrics have step axes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from lightning_revbn.runs.logs import find_logs, read_scalars
from lightning_revbn.runs.scalars import Scalars


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], object]], Scalars]:
    monkeypatch.setenv("WANDB_SILENT", "true")

    def written(write: Callable[[Any], object]) -> Scalars:
        logger = WandbLogger(save_dir=tmp_path, offline=True)
        write(logger)
        logger.experiment.finish()
        wandb.teardown()
        (log,) = find_logs([tmp_path])
        return read_scalars(log)

    return written


def points(scalars: Scalars, key: str) -> dict[int, float]:
    series = scalars.series[key]
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def test_every_metric_is_read_at_the_steps_of_its_own_axis(read: Callable[..., Scalars]) -> None:
    def write(logger: Any) -> None:
        run = logger.experiment
        run.define_metric("epochs")
        run.define_metric("val/*", step_metric="epochs")
        run.define_metric("val/per_sample", step_metric="samples")
        run.define_metric("val_loss", summary="min")
        for step in (0, 10, 20):
            logger.log_metrics({"val_loss": 1 - step / 100}, step=step)
        for epoch in range(3):
            run.log({"val/acc": epoch / 10, "val/per_sample": epoch / 20, "epochs": epoch, "samples": 5000 * epoch})

    scalars = read(write)
    assert points(scalars, "val_loss") == pytest.approx({0: 1.0, 10: 0.9, 20: 0.8})
    assert points(scalars, "val/acc") == pytest.approx({0: 0.0, 1: 0.1, 2: 0.2})
    assert points(scalars, "val/per_sample") == pytest.approx({0: 0.0, 5000: 0.05, 10_000: 0.1})
    assert scalars.last_step == 20
    assert not scalars.warnings


def test_values_at_no_step_of_the_axis_are_left_out_and_told(read: Callable[..., Scalars]) -> None:
    def write(logger: Any) -> None:
        run = logger.experiment
        for name in ("half", "other"):
            run.define_metric(name, step_metric="epochs")
        for index in range(4):
            run.log({"half": index, "other": index, "epochs": index / 2})
            logger.log_metrics({"val_loss": 1.0}, step=100 * index)

    scalars = read(write)
    assert points(scalars, "half") == {0: 0.0, 1: 2.0}
    assert scalars.last_step == 300
    (warning,) = scalars.warnings
    assert "left out 2 values of half (and of 1 more) that stand at no step of epochs" in warning


def test_a_metric_logged_past_the_trainers_steps_has_those_of_wandb(read: Callable[..., Scalars]) -> None:
    def write(logger: Any) -> None:
        for step in (0, 100):
            logger.log_metrics({"val_loss": 1.0, "test_acc": 0.5} if step else {"val_loss": 2.0}, step=step)
        for index in range(300):
            logger.experiment.log({"own": index})

    scalars = read(write)
    assert points(scalars, "val_loss") == {0: 2.0, 100: 1.0}
    assert points(scalars, "test_acc") == {100: 0.5}
    assert list(points(scalars, "own").values()) == list(range(300))
    assert scalars.last_step == 100


def test_a_run_without_the_trainers_steps_has_those_of_wandb(read: Callable[..., Scalars]) -> None:
    def write(logger: Any) -> None:
        for index in range(3):
            logger.experiment.log({"val_loss": 3.0 - index})

    scalars = read(write)
    assert points(scalars, "val_loss") == {0: 3.0, 1: 2.0, 2: 1.0}
    assert scalars.last_step == 2
    assert not scalars.warnings
