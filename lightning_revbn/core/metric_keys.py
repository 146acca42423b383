"""Names all metrics: the monitor writes the keys, and readers of logs, figures and TensorBoard's layout look for them.

A key is `{prefix}/{layer}/{quantity}` for a layer and `{prefix}/{quantity}` for the whole model. This module imports
only Python's own library, so that a log can be read without torch.
"""

from __future__ import annotations

__all__ = [
    "ACTIVATION_QUANTITIES",
    "AFFINE_KINDS",
    "DEFAULT_PREFIX",
    "LAYER_QUANTITIES",
    "NORMALIZED_ABSMAX",
    "NORMALIZED_OVER_3",
    "SCALE_DRIFT",
    "SCALE_LR",
    "SCALE_MEAN",
    "SHIFT_DRIFT",
    "SHIFT_LR",
    "SHIFT_MEAN",
    "STATISTICS",
    "WHOLE_MODEL_QUANTITIES",
    "affine_quantity",
    "first_part",
    "input_key",
    "metric_key",
]

DEFAULT_PREFIX = "revbn"
"""First part of every key, unless `BatchNormMonitor(prefix=...)` chooses another."""

AFFINE_KINDS = ("scale", "shift")
"""The two parameters of a batch norm layer."""
STATISTICS = ("mean", "std", "min", "max", "drift")
"""The statistics of a layer's scale and of its shift."""

SCALE_MEAN = "scale_mean"
SCALE_DRIFT = "scale_drift"
SHIFT_MEAN = "shift_mean"
SHIFT_DRIFT = "shift_drift"
SCALE_LR = "scale_lr"
"""The learning rate that updates the scales."""
SHIFT_LR = "shift_lr"
"""The learning rate that updates the shifts, if it differs from their group's learning rate."""
NORMALIZED_ABSMAX = "normalized_absmax"
"""The greatest `|x_hat|` of a batch."""
NORMALIZED_OVER_3 = "normalized_over_3"
"""The share of `|x_hat| > 3` in a batch."""

ACTIVATION_QUANTITIES = (NORMALIZED_ABSMAX, NORMALIZED_OVER_3)
"""Quantities that `BatchNormMonitor(activations=True)` adds, for layers and for the whole model."""
WHOLE_MODEL_QUANTITIES = (SCALE_MEAN, SCALE_DRIFT, SHIFT_DRIFT, SCALE_LR, SHIFT_LR, *ACTIVATION_QUANTITIES)
"""Quantities over all layers; callbacks and the progress bar see them too."""


def affine_quantity(kind: str, statistic: str) -> str:
    """Name a statistic of a parameter.

    Args:
        kind: An element of `AFFINE_KINDS`.
        statistic: An element of `STATISTICS`.

    Returns:
        The last part of a key.

    Example:
        >>> affine_quantity("scale", "drift")
        'scale_drift'
    """
    return f"{kind}_{statistic}"


LAYER_QUANTITIES = frozenset(
    (
        *(affine_quantity(kind, statistic) for kind in AFFINE_KINDS for statistic in STATISTICS),
        *ACTIVATION_QUANTITIES,
    )
)
"""Quantities of a single layer."""


def metric_key(prefix: str, layer: str, quantity: str) -> str:
    """Build a key.

    Args:
        prefix: First part; may be empty.
        layer: Dotted name of the layer; empty for the whole model, and for a model that is a batch norm layer itself.
        quantity: The name of the quantity.

    Returns:
        The parts that are not empty, joined by `/`.

    Example:
        >>> metric_key("revbn", "layer1.0.bn1", "scale_mean"), metric_key("revbn", "", "scale_lr")
        ('revbn/layer1.0.bn1/scale_mean', 'revbn/scale_lr')
    """
    return "/".join(part for part in (prefix, layer, quantity) if part)


def first_part(prefix: str) -> str:
    """Return the text that every key of a prefix begins with.

    Args:
        prefix: The prefix; may be empty.

    Returns:
        The prefix with its slash; empty without a prefix.
    """
    return f"{prefix}/" if prefix else ""


def input_key(prefix: str, quantity: str, name: str = "") -> str:
    """Build the key of a statistic of the network's input.

    Args:
        prefix: First part; may be empty.
        quantity: `"mean"` or `"std"`; for a single channel with its number, as in `"mean_0"`.
        name: The name of the input, if there are several.

    Returns:
        The key.

    Example:
        >>> input_key("revbn", "std_2"), input_key("revbn", "mean", "radar")
        ('revbn/input/std_2', 'revbn/input/radar/mean')
    """
    return metric_key(prefix, metric_key("input", "", name), quantity)
