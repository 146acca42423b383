"""Made-up runs to draw, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torchvision
from torch import nn

from lightning_revbn.plots.layer_rows import ROWS
from lightning_revbn.runs.batch_norm_runs import Run
from lightning_revbn.runs.scalars import Series

AFFINE = ("scale_mean", "shift_mean", "scale_drift", "shift_drift")
ALL = tuple(row.quantity for row in ROWS)
RESNET_152 = [f"model.{n}" for n, m in torchvision.models.resnet152().named_modules() if isinstance(m, nn.BatchNorm2d)]
RESNET_18 = [f"model.{n}" for n, m in torchvision.models.resnet18().named_modules() if isinstance(m, nn.BatchNorm2d)]
SMALL_NET = ["model.stem.1", "model.block1.bn1", "model.block1.bn2", "model.head.1"]


def make_run(
    layers: Sequence[str],
    start: float = 1.0,
    quantities: Sequence[str] = ALL,
    steps: Sequence[int] = range(0, 500, 100),
    label: str = "baseline",
    change: Callable[[str, str, np.ndarray], np.ndarray] = lambda layer, quantity, values: values,
) -> Run:
    """Make a run whose values differ by layer, quantity and step."""
    time = np.arange(len(steps)) / 5
    series: dict[tuple[str, str], Series] = {}
    for depth, layer in enumerate(layers):
        sign = (-1) ** depth * (depth + 1) / len(layers)
        values = {
            "scale_mean": start * (1 + 0.3 * sign * time),
            "shift_mean": 0.2 * sign * time,
            "scale_drift": 0.4 * abs(sign) * time,
            "shift_drift": 0.2 * abs(sign) * time,
            "normalized_absmax": 4 + 9 * abs(sign) * time,
            "normalized_over_3": 0.002 + 0.01 * abs(sign) * time,
        }
        for quantity in quantities:
            drawn = change(layer, quantity, values[quantity])
            series[layer, quantity] = Series(np.asarray(steps, dtype=np.int64), drawn)
    return Run(label, tuple(layers), series, whole_model=tuple(layers) == ("",))


def pair(layers: Sequence[str], **options: Any) -> list[Run]:
    return [make_run(layers, **options), make_run(layers, start=0.1, label="revisited", **options)]
