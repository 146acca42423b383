"""Measures the scales and shifts of all batch norm layers, with a single copy to the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from lightning_revbn.core.affine_parameters import AffineParameters, Floats
from lightning_revbn.core.layers import BatchNormRecord
from lightning_revbn.core.metric_keys import SCALE_MEAN, STATISTICS, affine_quantity, metric_key

__all__ = ["AffineStatistics"]


class AffineStatistics:
    """Mean, standard deviation, least, greatest and drift of every layer's scale and shift.

    Drift is the root mean square distance from the values at the time this object was made, or from `start`. The
    standard deviation is taken over channels, `sqrt(mean((x - mean)^2))`, so it is 0 for a single channel.

    The values of all layers are joined on their device, copied to the host once, and measured there in float64 by a few
    calls. If FSDP2 has sharded parameters, every rank must take part, here and in `compute`. A parametrised scale or
    shift is measured as the layer uses it.

    Args:
        records: The layers; a layer without a scale or shift has no statistics of it.
        start: The `state_dict()` of an earlier object, to go on measuring drift from its start.
        prefix: First part of every key, as in `metric_key`.

    Raises:
        ValueError: If `start` belongs to other layers.

    Example:
        >>> from torch import nn
        >>> from lightning_revbn import find_batch_norms
        >>> statistics = AffineStatistics(find_batch_norms(nn.Sequential(nn.BatchNorm2d(3))))
        >>> statistics.compute()["0/scale_mean"]
        1.0
    """

    def __init__(
        self, records: Sequence[BatchNormRecord], start: dict[str, Any] | None = None, prefix: str = ""
    ) -> None:
        self._prefix = prefix
        self._parameters = parameters = AffineParameters(records)
        self._widths = np.array([width for widths in parameters.channels.values() for width in widths], dtype=np.int64)
        self._offsets = np.cumsum(self._widths) - self._widths
        kinds = [(name, kind) for kind, names in parameters.names.items() for name in names]
        self._keys = [
            metric_key(prefix, name, affine_quantity(kind, statistic))
            for statistic in STATISTICS
            for name, kind in kinds
        ]
        self._scratch = np.empty(int(self._widths.sum()))  # reused by every measurement
        # A copy, since the next read writes over the values.
        self._start = np.array(parameters.read()) if start is None else self._joined(start)

    @np.errstate(over="ignore", invalid="ignore")  # where training has diverged, infinity and NaN are the answer
    def compute(self, per_layer: bool = True) -> dict[str, float]:
        """Compute the statistics of the present values.

        Args:
            per_layer: Whether to return the statistics of every layer too.

        Returns:
            `{layer}/scale_mean`, `_std`, `_min`, `_max`, `_drift` and the same for `shift_`; over all channels of the
            model `scale_mean`, `scale_drift` and `shift_drift`.
        """
        if not self._parameters:
            return {}
        values, scratch = self._parameters.read(), self._scratch
        sums = self._sums(values)
        moved = self._sums(np.square(np.subtract(values, self._start, out=scratch), out=scratch))
        result: dict[str, float] = {}
        if per_layer:
            mean = sums / self._widths
            # A second pass, since trained scales may lie close together and far from 0: E[x^2] - E[x]^2 would cancel.
            np.subtract(values, np.repeat(mean, self._widths), out=scratch)
            spread = self._sums(np.square(scratch, out=scratch))
            std, drift = np.sqrt(spread / self._widths), np.sqrt(moved / self._widths)
            extremes = [extreme.reduceat(values, self._offsets) for extreme in (np.minimum, np.maximum)]
            table = np.concatenate([mean, std, *extremes, drift])  # in the order of STATISTICS
            result = dict(zip(self._keys, cast("list[float]", table.tolist()), strict=True))
        scales = len(self._parameters.names["scale"])
        for kind, layers in (("scale", slice(0, scales)), ("shift", slice(scales, None))):
            channels = sum(self._parameters.channels[kind])
            if channels:
                if kind == "scale":
                    result[metric_key(self._prefix, "", SCALE_MEAN)] = float(sums[layers].sum()) / channels
                result[metric_key(self._prefix, "", affine_quantity(kind, "drift"))] = math.sqrt(
                    moved[layers].sum() / channels
                )
        return result

    def histograms(self) -> dict[str, Floats]:
        """Return the values themselves.

        Returns:
            `{layer}/scale` and `{layer}/shift`, shape `(C,)` each.
        """
        parameters = self._parameters
        rows = np.split(np.array(parameters.read()), self._offsets[1:]) if parameters else []
        keys = [metric_key(self._prefix, name, kind) for kind, names in parameters.names.items() for name in names]
        return dict(zip(keys, rows, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the values that drift is measured from: names, channels and a flat tensor, for scale and shift."""
        parameters = self._parameters
        state: dict[str, Any] = {}
        first = 0
        for kind, channels in parameters.channels.items():
            part = torch.from_numpy(self._start[first : first + sum(channels)])  # pyright: ignore[reportUnknownMemberType] # torch does not type it
            first += sum(channels)
            # The precision of the parameters holds the values exactly, and keeps checkpoints small.
            values = part.to(parameters.dtype, copy=True)
            state[kind] = {"layers": parameters.names[kind], "channels": channels, "values": values}
        return state

    def _joined(self, start: dict[str, Any]) -> Floats:
        """Return a saved start as a vector."""
        names, channels = self._parameters.names, self._parameters.channels
        for kind in names:
            saved = start.get(kind, {})
            if [*saved.get("layers", ())] != names[kind] or [*saved.get("channels", ())] != channels[kind]:
                raise ValueError("the values to measure drift from are of other layers")
        return cast("Floats", torch.cat([start[kind]["values"].cpu().double() for kind in names]).numpy())

    def _sums(self, values: Floats) -> Floats:
        """Return the sum over the channels of every layer, scales first."""
        # A single call for all layers: a model may have thousands, and a call costs more than the sum of a layer.
        return np.add.reduceat(values, self._offsets)
