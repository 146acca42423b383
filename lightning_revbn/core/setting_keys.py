"""The names of a run's settings among its hyperparameters: loggers get them, readers of logs look for them.

Nothing is imported here but Python's own library, so that a log can be read without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["BASELINE_SETTINGS", "SEED_KEY", "SETTINGS_PREFIX"]

SETTINGS_PREFIX = "revbn/"
"""What every name begins with."""

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
"""The settings of `RevisitedBatchNorm` by name, at values with which a run is a baseline."""
