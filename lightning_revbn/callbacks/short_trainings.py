"""Tells the user if a planned training is too short: all trainings of that length in our results lost."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_revbn.callbacks.rule_settings import RuleSettings
from lightning_revbn.core.initialization import InitReport
from lightning_revbn.lightning_compat import callbacks_of, rank_zero_info

__all__ = ["LOST_UP_TO", "tell_if_too_short"]

LOST_UP_TO = {0.25: 150, 0.1: 360}
"""Optimizer steps by scale: in docs/results.md, every training of at most this many steps ended below its baseline.

Each 95 % interval lies below 0. These trainings had divisor 100, the eps from the code, and no shift multiplier.
"""


def tell_if_too_short(owner: str, report: InitReport, settings: RuleSettings, trainer: Trainer) -> None:
    """Compare the planned steps of a training with our results for its scale, and tell the user if all of these lost.

    Scales and settings without results cause no message.

    Args:
        owner: The callback's name, for the message.
        report: The layers with the verdict on each.
        settings: How scales and shifts learn.
        trainer: The Trainer, with its data loaders.
    """
    started = {record.target for record in report.records if record.verdict == "rewrite"}
    plain = settings.divisor == _DIVISOR and settings.shift_multiplier == 1
    has_other_eps = any(record.eps_before is not None for record in report.records)
    if trainer.global_step or len(started) != 1 or not plain or has_other_eps:
        return
    (scale,) = started
    planned = _planned_steps(trainer)
    if planned is not None and scale in LOST_UP_TO and planned <= LOST_UP_TO[scale]:
        rank_zero_info(
            f"{owner}: this training has {planned:g} optimizer steps. In our results every training of up to "
            f"{LOST_UP_TO[scale]} steps from scale {scale:g} ended below its baseline: see docs/results.md"
        )


_DIVISOR = 100
"""The divisor of the results."""


def _planned_steps(trainer: Trainer) -> float | None:
    """Return the planned number of optimizer steps; None if it cannot be known."""
    is_trial = bool(getattr(trainer, "fast_dev_run", False))  # Lightning does not type it
    schedules = (own for own in callbacks_of(trainer) if isinstance(own, GradientAccumulationScheduler))
    # Lightning's estimate takes the present accumulation of gradients for the whole training.
    changes = any(len(set(own.scheduling.values())) > 1 for own in schedules)
    if is_trial or changes or not trainer.lightning_module.automatic_optimization:
        return None
    planned = trainer.estimated_stepping_batches
    return planned if planned > 0 else None  # -1: an endless stream of batches
