"""Statistics of the scales and shifts of all batch norm layers, in one pass and one copy to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lightning_revbn.core.layers import BatchNormRecord

STATISTICS = ("mean", "std", "min", "max", "drift")


class AffineStatistics:
    """Mean, standard deviation, least, greatest and drift of every layer's scale and shift.

    The drift is the root mean square distance from the values at the time this object was made (or from `start`). The
    standard deviation is that of the channels themselves, `sqrt(mean((x - mean)^2))`, so it is 0 for one channel.

    Args:
        records: The layers; those without a scale or shift have no statistics of it.
        start: What `state_dict()` of an earlier object returned, to go on measuring drift from there.

    Raises:
        ValueError: If `start` is of other layers.

    Example:
        >>> from torch import nn
        >>> from lightning_revbn import find_batch_norms
        >>> statistics = AffineStatistics(find_batch_norms(nn.Sequential(nn.BatchNorm2d(3))))
        >>> statistics.compute()["0/scale_mean"]
        1.0
    """

    def __init__(self, records: Sequence[BatchNormRecord], start: dict[str, Any] | None = None) -> None:
        self._kinds = {
            "scale": _Kind({record.name: record.scale for record in records if record.scale is not None}),
            "shift": _Kind({record.name: record.shift for record in records if record.shift is not None}),
        }
        if start is not None:
            for key, kind in self._kinds.items():
                kind.set_start(start[key])

    def compute(self, per_layer: bool = True) -> dict[str, float]:
        """Compute the statistics of the present values.

        Args:
            per_layer: Whether to return those of single layers too.

        Returns:
            `{layer}/scale_mean`, `_std`, `_min`, `_max`, `_drift` and the same for `shift_`; over all channels of the
            model `scale_mean`, `scale_drift` and `shift_drift`.
        """
        computed = {key: kind.compute() for key, kind in self._kinds.items() if kind.names}
        if not computed:
            return {}
        host = iter(_to_floats(torch.cat([table.flatten() for table in computed.values()])))
        result: dict[str, float] = {}
        for key in computed:
            names = self._kinds[key].names
            for statistic in STATISTICS:
                for name in [*names, None]:
                    value = next(host)
                    if name is None:
                        if statistic in ("mean", "drift") and (key, statistic) != ("shift", "mean"):
                            result[f"{key}_{statistic}"] = value
                    elif per_layer:
                        result[f"{name}/{key}_{statistic}" if name else f"{key}_{statistic}"] = value
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the values that drift is measured from: names, channels and one flat tensor, for scale and shift."""
        return {key: kind.start_state() for key, kind in self._kinds.items()}


class _Kind:
    """The scales, or the shifts, of all layers as one flat vector with the layer's index beside each channel."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.names = list(parameters)
        self._parameters = list(parameters.values())
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._dtype = self._parameters[0].dtype if self._parameters else torch.float32
        if not self._parameters:
            self._start = torch.empty(0)
            return
        start = self._flat()
        layers = torch.arange(len(self._sizes), device=start.device)
        self._layer = torch.repeat_interleave(layers, torch.tensor(self._sizes, device=start.device))
        self._counts = torch.tensor([*self._sizes, start.numel()], device=start.device, dtype=start.dtype)
        self._start = start

    def compute(self) -> Tensor:
        """Return shape `(5, L + 1)`: the statistics of L layers, and in the last column those of all channels."""
        values = self._flat()
        mean = self._average(values)
        spread = self._average((values - mean[self._layer]) ** 2).sqrt()
        drift = self._average((values - self._start) ** 2).sqrt()
        least, greatest = self._extreme(values, "amin"), self._extreme(values, "amax")
        return torch.stack([mean, spread, least, greatest, drift])

    def start_state(self) -> dict[str, Any]:
        return {"layers": self.names, "channels": self._sizes, "values": self._start.to(self._dtype).cpu()}

    def set_start(self, state: dict[str, Any]) -> None:
        if list(state["layers"]) != self.names or list(state["channels"]) != self._sizes:
            raise ValueError("the values to measure drift from are those of other layers")
        if self.names:
            self._start = state["values"].to(self._start)

    def _flat(self) -> Tensor:
        device = self._parameters[0].device
        # Half precision would round the sums; MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        with torch.no_grad():
            return torch.cat([parameter.detach().to(device).flatten() for parameter in self._parameters]).to(dtype)

    def _average(self, values: Tensor) -> Tensor:
        sums = values.new_zeros(len(self._sizes)).index_add_(0, self._layer, values)
        return torch.cat([sums, values.sum(0, keepdim=True)]) / self._counts

    def _extreme(self, values: Tensor, reduce: str) -> Tensor:
        found = values.new_empty(len(self._sizes)).scatter_reduce_(0, self._layer, values, reduce, include_self=False)
        return torch.cat([found, getattr(found, reduce)(0, keepdim=True)])


def _to_floats(vector: Tensor) -> list[float]:
    return cast("list[float]", vector.tolist())  # pyright: ignore[reportUnknownMemberType] # torch does not type it
