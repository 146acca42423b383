"""Groups the charts of all batch norm layers on TensorBoard's page "Custom Scalars"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TypeAlias

from lightning_revbn.core.metric_keys import (
    NORMALIZED_ABSMAX,
    NORMALIZED_OVER_3,
    SCALE_DRIFT,
    SCALE_LR,
    SCALE_MEAN,
    SHIFT_DRIFT,
    SHIFT_MEAN,
    metric_key,
)

__all__ = ["LAYERS_IN_A_CHART", "Layout", "scalar_layout"]

Layout: TypeAlias = "dict[str, dict[str, list[str | list[str]]]]"

LAYERS_IN_A_CHART = 16
"""The most lines of a chart that readers can tell apart."""

_AFFINE_CHARTS = {
    "Scale: mean": SCALE_MEAN,
    "Scale: drift": SCALE_DRIFT,
    "Shift: mean": SHIFT_MEAN,
    "Shift: drift": SHIFT_DRIFT,
}
_ACTIVATION_CHARTS = {
    "Greatest |x_hat|": NORMALIZED_ABSMAX,
    "Share of |x_hat| > 3": NORMALIZED_OVER_3,
}
_WHOLE_MODEL_CHARTS = {
    "Scale: mean": (SCALE_MEAN,),
    "Drift": (SCALE_DRIFT, SHIFT_DRIFT),
    "Learning rate of the scales": (SCALE_LR,),
}


def scalar_layout(prefix: str, layers: Sequence[str], *, activations: bool = False, per_layer: bool = True) -> Layout:
    """Lay out the charts by category: first the whole model, then every stage of the model.

    Args:
        prefix: First part of every key.
        layers: Dotted names of the layers, in the order of the model.
        activations: Whether normalised activations are logged.
        per_layer: Whether single layers are logged.

    Returns:
        Titles of charts and their tags by category, as `SummaryWriter.add_custom_scalars` takes them.

    Example:
        >>> list(scalar_layout("revbn", ["bn1", "layer1.0.bn1", "layer1.0.bn2"]))
        ['revbn: the whole model', 'revbn: bn1 to layer1.0.bn2']
    """
    whole = dict(_WHOLE_MODEL_CHARTS)
    if activations:
        whole |= {title: (key,) for title, key in _ACTIVATION_CHARTS.items()}
    layout: Layout = {
        f"{prefix}: the whole model": {title: _lines(prefix, [""], keys) for title, keys in whole.items()}
    }
    charts = _AFFINE_CHARTS | (_ACTIVATION_CHARTS if activations else {})
    for names in _stages(layers) if per_layer else []:
        title = f"{prefix}: {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "")
        layout[title] = {chart: _lines(prefix, names, [key]) for chart, key in charts.items()}
    return layout


def _lines(prefix: str, layers: Sequence[str], keys: Sequence[str]) -> list[str | list[str]]:
    # TensorBoard reads these tags as regular expressions, and matches them from the start.
    tags = [metric_key(prefix, layer, key) for layer in layers for key in keys]
    return ["Multiline", [f"{re.escape(tag)}$" for tag in tags]]


def _stages(layers: Sequence[str], depth: int = 0) -> list[list[str]]:
    """Cut the layers into runs that fit a chart, between modules of the first depth that allows it."""
    if len(layers) <= LAYERS_IN_A_CHART:
        return [list(layers)] if layers else []
    stages: list[list[str]] = []
    for _, module in groupby(layers, key=lambda layer: layer.split(".")[: depth + 1]):
        for part in _stages(list(module), depth + 1):
            if stages and len(stages[-1]) + len(part) <= LAYERS_IN_A_CHART:
                stages[-1] += part
            else:
                stages.append(part)
    return stages
