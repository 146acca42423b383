"""Names a run's settings among its hyperparameters: loggers get these names, readers of logs look for them.

This module imports only Python's own library, so that a log can be read without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["BASELINE_SETTINGS", "SEED_KEY", "SETTINGS_PREFIX"]

SETTINGS_PREFIX = "revbn/"
"""The first part of every name."""

SEED_KEY = f"{SETTINGS_PREFIX}seed"
"""The seed of `seed_everything`, which pairs runs."""

BASELINE_SETTINGS: Mapping[str, object] = MappingProxyType(
    {
        "scale": 1.0,
        "scale_lr_divisor": 1.0,
        "shift_lr_multiplier": 1.0,
        "eps": None,
        "weight_decay_exempt": None,
        "include": ["*"],
        "exclude": [],
        "zero_scale": "keep",
        "trained": "keep",
    }
)
"""The settings of `RevisitedBatchNorm` by name, with the values of a baseline."""
