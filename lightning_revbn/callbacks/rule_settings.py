"""The user's settings of how scales and shifts learn."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_revbn.core.param_groups import WeightDecayExempt

__all__ = ["RuleSettings"]


@dataclass(frozen=True)
class RuleSettings:
    """How scales and shifts learn.

    Attributes:
        divisor: The constant c; scales learn with lr / c. Values up to 1 switch the division off.
        shift_multiplier: The constant k; shifts learn with lr * k.
        weight_decay_exempt: The parameters without weight decay.
    """

    divisor: float
    shift_multiplier: float
    weight_decay_exempt: WeightDecayExempt | None
