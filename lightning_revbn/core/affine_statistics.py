"""Statistics of the scales and shifts of all batch norm layers, in one pass and one copy to the host."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_revbn.core.layers import BatchNormRecord
from lightning_revbn.core.metric_keys import SCALE_MEAN, STATISTICS, affine_quantity, metric_key

_Floats: TypeAlias = NDArray[np.float64]
_ATTRIBUTES = {"scale": "weight", "shift": "bias"}


class AffineStatistics:
    """Mean, standard deviation, least, greatest and drift of every layer's scale and shift.

    The drift is the root mean square distance from the values at the time this object was made (or from `start`). The
    standard deviation is that of the channels themselves, `sqrt(mean((x - mean)^2))`, so it is 0 for one channel.

    However many layers there are, all values are joined on their device, copied to the host once, and measured there
    in float64, by a few calls over all layers. Of parameters that FSDP2 has sharded every rank must take part, here and
    in `compute`. A parametrised scale or shift is measured as the layer uses it.

    Args:
        records: The layers; those without a scale or shift have no statistics of it.
        start: What `state_dict()` of an earlier object returned, to go on measuring drift from there.
        prefix: First part of every key, as in `metric_key`.

    Raises:
        ValueError: If `start` is of other layers.

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
        self._names: dict[str, list[str]] = {}
        self._channels: dict[str, list[int]] = {}
        self._parameters: list[Tensor] = []
        self._unready: dict[int, Callable[[], Tensor]] = {}
        for kind, attribute in _ATTRIBUTES.items():
            of_kind = [(record.name, record.module, getattr(record, kind)) for record in records]
            # A shard without elements has nothing to measure.
            layers = [(name, module, own) for name, module, own in of_kind if own is not None and own.numel()]
            self._names[kind] = [name for name, _, _ in layers]
            self._channels[kind] = [own.numel() for _, _, own in layers]
            for _, module, own in layers:
                reader = _reader(module, attribute, own, self._parameters[0].device if self._parameters else own.device)
                if reader is not None:
                    self._unready[len(self._parameters)] = reader
                self._parameters.append(own)
        self._widths = np.array([width for widths in self._channels.values() for width in widths], dtype=np.int64)
        self._offsets = np.cumsum(self._widths) - self._widths
        kinds = [(name, kind) for kind, names in self._names.items() for name in names]
        self._keys = [
            metric_key(prefix, name, affine_quantity(kind, statistic))
            for statistic in STATISTICS
            for name, kind in kinds
        ]
        self._dtype = functools.reduce(torch.promote_types, (own.dtype for own in self._parameters), torch.float16)
        # Memory that is used again: to ask the system for some megabytes takes longer than to fill them.
        self._values = torch.empty(int(self._widths.sum()), dtype=torch.float64)
        self._scratch = np.empty(len(self._values))
        self._start = np.array(self._read()) if start is None else self._joined(start)

    @np.errstate(over="ignore", invalid="ignore")  # where training has diverged, infinity and NaN are the answer
    def compute(self, per_layer: bool = True) -> dict[str, float]:
        """Compute the statistics of the present values.

        Args:
            per_layer: Whether to return those of single layers too.

        Returns:
            `{layer}/scale_mean`, `_std`, `_min`, `_max`, `_drift` and the same for `shift_`; over all channels of the
            model `scale_mean`, `scale_drift` and `shift_drift`.
        """
        if not self._parameters:
            return {}
        values, scratch = self._read(), self._scratch
        sums = self._sums(values)
        moved = self._sums(np.square(np.subtract(values, self._start, out=scratch), out=scratch))
        result: dict[str, float] = {}
        if per_layer:
            mean = sums / self._widths
            np.subtract(values, np.repeat(mean, self._widths), out=scratch)
            spread = self._sums(np.square(scratch, out=scratch))
            std, drift = np.sqrt(spread / self._widths), np.sqrt(moved / self._widths)
            extremes = [extreme.reduceat(values, self._offsets) for extreme in (np.minimum, np.maximum)]
            table = np.concatenate([mean, std, *extremes, drift])  # in the order of STATISTICS
            result = dict(zip(self._keys, cast("list[float]", table.tolist()), strict=True))
        scales = len(self._names["scale"])
        for kind, layers in (("scale", slice(0, scales)), ("shift", slice(scales, None))):
            channels = sum(self._channels[kind])
            if channels:
                if kind == "scale":
                    result[metric_key(self._prefix, "", SCALE_MEAN)] = float(sums[layers].sum()) / channels
                result[metric_key(self._prefix, "", affine_quantity(kind, "drift"))] = math.sqrt(
                    moved[layers].sum() / channels
                )
        return result

    def histograms(self) -> dict[str, _Floats]:
        """Return the values themselves.

        Returns:
            `{layer}/scale` and `{layer}/shift`, shape `(C,)` each.
        """
        rows = np.split(np.array(self._read()), self._offsets[1:]) if self._parameters else []
        keys = [metric_key(self._prefix, name, kind) for kind, names in self._names.items() for name in names]
        return dict(zip(keys, rows, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the values that drift is measured from: names, channels and one flat tensor, for scale and shift."""
        state: dict[str, Any] = {}
        first = 0
        for kind, channels in self._channels.items():
            part = torch.from_numpy(self._start[first : first + sum(channels)])  # pyright: ignore[reportUnknownMemberType] # torch does not type it
            first += sum(channels)
            state[kind] = {"layers": self._names[kind], "channels": channels, "values": part.to(self._dtype, copy=True)}
        return state

    def _read(self) -> _Floats:
        """Return the values of all scales, then of all shifts, as one vector; the next call writes over it."""
        with torch.no_grad():
            parameters = self._parameters
            if self._unready:
                parameters = [self._unready[i]() if i in self._unready else own for i, own in enumerate(parameters)]
            # MPS has no float64, so the precision is raised on the host.
            if parameters:
                self._values.copy_(torch.cat(parameters).cpu())
        return cast("_Floats", self._values.numpy())

    def _joined(self, start: dict[str, Any]) -> _Floats:
        """Return a saved start as one vector."""
        for kind, names in self._names.items():
            saved = start.get(kind, {})
            if [*saved.get("layers", ())] != names or [*saved.get("channels", ())] != self._channels[kind]:
                raise ValueError("the values to measure drift from are those of other layers")
        return cast("_Floats", torch.cat([start[kind]["values"].cpu().double() for kind in self._names]).numpy())

    def _sums(self, values: _Floats) -> _Floats:
        """Return the sum over the channels of every layer, scales first."""
        return np.add.reduceat(values, self._offsets)


def _reader(module: nn.Module, attribute: str, own: Tensor, device: torch.device) -> Callable[[], Tensor] | None:
    """Return how to get the values where a parameter cannot be joined to others as it is; None where it can."""
    if is_parametrized(module, attribute):
        return lambda: getattr(module, attribute).flatten().to(device)
    gather: Callable[[], Tensor] | None = getattr(own, "full_tensor", None)
    if gather is not None:
        return lambda: gather().flatten().to(device)
    if own.dim() != 1 or own.device != device:
        return lambda: own.flatten().to(device)
    return None
