"""Logs the settings in force as hyperparameters, beside the user's hyperparameters."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_revbn.core.next_call import NextCall
from lightning_revbn.core.setting_keys import SEED_KEY, SETTINGS_PREFIX
from lightning_revbn.lightning_compat import logs_hyperparameters, rank_zero_warn, twins

__all__ = ["announce", "log"]

_SEED_VARIABLE = "PL_GLOBAL_SEED"
"""The variable by which `seed_everything` of both packages passes the seed to processes that Lightning starts."""


def announce(trainer: Trainer, settings: Mapping[str, Any], caller: str = "RevisitedBatchNorm") -> list[NextCall]:
    """Give the settings to TensorBoard loggers, before Lightning logs the user's hyperparameters.

    TensorBoardLogger writes `hparams.yaml` only then. TensorBoard shows a run's first set of hyperparameters and
    ignores all others, so our settings join the user's set. If the user logs no hyperparameters, TensorBoard gets no
    hyperparameter set and no `hp_metric`.

    Args:
        trainer: The Trainer, at `on_fit_start`.
        settings: The settings by name.
        caller: Who logs them, for warnings.

    Returns:
        The changes to the loggers, to be undone by the end of the fit.
    """
    ours = _entries(settings)
    joined: list[NextCall] = []
    for logger in _takers(trainer):
        if isinstance(logger, twins(TensorBoardLogger)):
            # Without `metrics={}`, Lightning would write a set of hyperparameters, and an `hp_metric` of -1.
            _log(logger, ours, caller, metrics={})
            joined.append(NextCall(logger, "log_hyperparams", _joined_by(ours)))
    return joined


def log(trainer: Trainer, settings: Mapping[str, Any], caller: str = "RevisitedBatchNorm") -> None:
    """Give the settings to all other loggers, after the user's hyperparameters.

    Args:
        trainer: The Trainer, at `on_train_start`.
        settings: The settings by name.
        caller: Who logs them, for warnings.
    """
    for logger in _takers(trainer):
        if not isinstance(logger, twins(TensorBoardLogger)):
            _log(logger, _entries(settings), caller)


def _entries(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `revbn/...` entries without containers: loggers treat containers differently, and MLflow refuses patterns.

    The entries include the seed of `seed_everything`, so that the runs of any script can be paired.
    """
    entries = {
        f"{SETTINGS_PREFIX}{name}": json.dumps(value) if isinstance(value, (dict, list)) else value
        for name, value in settings.items()
    }
    seed = os.environ.get(_SEED_VARIABLE, "")
    # `isdigit` also accepts digits such as '²', which int refuses.
    return {**entries, SEED_KEY: int(seed)} if seed.isascii() and seed.isdigit() else entries


def _takers(trainer: Trainer) -> list[Logger]:
    """List the loggers on rank 0; return none on other ranks, or if the user switched hyperparameters off."""
    return trainer.loggers if logs_hyperparameters(trainer) and trainer.is_global_zero else []


def _log(logger: Logger, entries: dict[str, Any], caller: str, **options: Any) -> None:
    try:
        logger.log_hyperparams(entries, **options)
    except Exception as error:  # a refusal must not end training: MLflow refuses changed values
        rank_zero_warn(
            f"{caller}: {type(logger).__name__} did not take the settings as hyperparameters, which some "
            f"loggers never change once they are written. Checkpoints have them. It says: {error}"
        )


def _joined_by(ours: dict[str, Any]) -> Callable[..., None]:
    def around(method: Callable[..., None], params: Any = None, *args: Any, **kwargs: Any) -> None:
        theirs = vars(params) if isinstance(params, Namespace) else dict(params or {})
        method({**ours, **theirs}, *args, **kwargs)

    return around
