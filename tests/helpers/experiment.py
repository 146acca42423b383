"""Writes an experiment without training: a baseline and two arms over the same seeds, in the logs of four loggers.

MLflow's logs are in both kinds of its local stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

KINDS = ("csv", "tensorboard", "wandb", "mlflow", "mlruns")
SEEDS = (1, 2, 3, 4, 5, 6)
SCORES = {1.0: (0.75, 0.5, 0.625, 0.75, 0.5, 0.625), 0.1: (0.875, 0.75, 0.75, 0.75, 0.625, 0.875), 0.5: (0.5,) * 6}
"""Scores by scale; float32, the type of event files, holds these numbers exactly."""
CURVE = ((0, 2.0), (10, 1.0), (20, 0.5))


def write_experiment(folder: Path) -> None:
    """Write the logs of each kind into a folder named after the kind, seed by seed."""
    for index, seed in enumerate(SEEDS):
        for scale, scores in SCORES.items():
            for logger in loggers(folder, f"{scale}-{index}"):
                write_run(logger, {"revbn/scale": scale, "revbn/seed": seed, "lr": 0.1, "name": None}, scores[index])
    wandb.teardown()  # W&B's service may still write after the runs have finished


def loggers(folder: Path, name: str) -> list[Logger]:
    for kind in KINDS:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    return [
        CSVLogger(folder / "csv", name=name),
        TensorBoardLogger(folder / "tensorboard", name=name),
        WandbLogger(save_dir=folder / "wandb", offline=True),
        MLFlowLogger("experiment", tracking_uri=f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"),
        MLFlowLogger("experiment", tracking_uri=(folder / "mlruns").as_uri()),
    ]


def write_run(logger: Logger, hyperparameters: Mapping[str, Any], score: float) -> None:
    logger.log_hyperparams(dict(hyperparameters))
    for step, loss in CURVE:
        metrics = {"val_loss": loss * hyperparameters["revbn/scale"], "revbn/a/scale_mean": 1.0, "epoch": step // 10}
        logger.log_metrics(metrics, step=step)
    logger.log_metrics({"test_acc": score}, step=20)
    logger.save()
    logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
