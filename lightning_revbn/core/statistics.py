"""Statistics of the scales and shifts of all batch norm layers, in one pass and one copy to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """The scales, or the shifts, of all layers, in one matrix for every number of channels."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.names = list(parameters)
        self._parameters = list(parameters.values())
        self._channels = [parameter.numel() for parameter in self._parameters]
        by_channels: dict[int, list[int]] = {}
        for index, channels in enumerate(self._channels):
            by_channels.setdefault(channels, []).append(index)
        self._groups = list(by_channels.values())
        # Where each layer stands once the groups are joined.
        joined = [index for group in self._groups for index in group]
        self._order = sorted(range(len(joined)), key=joined.__getitem__)
        self._starts = self._matrices()

    def compute(self) -> Tensor:
        """Return shape `(5, L + 1)`: the statistics of L layers, and in the last column those of all channels."""
        columns: list[Tensor] = []
        channels: list[int] = []
        for values, start in zip(self._matrices(), self._starts, strict=True):
            variance, mean = torch.var_mean(values, dim=1, correction=0)
            least, greatest = torch.aminmax(values, dim=1)
            drift = (values - start).square_().mean(dim=1)
            columns.append(torch.stack([mean, variance, least, greatest, drift]))
            channels += [values.shape[1]] * values.shape[0]
        table = torch.cat(columns, dim=1)
        share = table.new_tensor(channels) / sum(channels)
        mean, variance, least, greatest, drift = table
        total = (mean * share).sum()
        # The variance of all channels is that within the layers and that between them.
        spread = ((variance + (mean - total) ** 2) * share).sum()
        whole = torch.stack([total, spread, least.min(), greatest.max(), (drift * share).sum()])
        table = torch.cat([table[:, self._order], whole[:, None]], dim=1)
        table[[1, 4]] = table[[1, 4]].sqrt()
        return table

    def start_state(self) -> dict[str, Any]:
        rows = [row for matrix in self._starts for row in matrix]
        flat = [rows[place].to(self._parameters[index].dtype).cpu() for index, place in enumerate(self._order)]
        return {"layers": self.names, "channels": self._channels, "values": torch.cat(flat) if flat else torch.empty(0)}

    def set_start(self, state: dict[str, Any]) -> None:
        if list(state["layers"]) != self.names or list(state["channels"]) != self._channels:
            raise ValueError("the values to measure drift from are those of other layers")
        self._starts = self._matrices(list(state["values"].split(self._channels)))

    def _matrices(self, rows: list[Tensor] | None = None) -> list[Tensor]:
        """Return one matrix for every number of channels, a row a layer: of the parameters, or of other values."""
        rows = [_whole(parameter).flatten() for parameter in self._parameters] if rows is None else rows
        device = self._parameters[0].device if self._parameters else None
        # Half precision would round the sums; MPS has no float64.
        dtype = torch.float32 if device is not None and device.type == "mps" else torch.float64
        return [torch.stack([rows[index].to(device) for index in group]).to(dtype) for group in self._groups]


def _whole(parameter: Tensor) -> Tensor:
    """Return the values of a parameter; of one that FSDP2 has sharded, all of them: every rank must take part."""
    values = parameter.detach()
    gather: Callable[[], Tensor] | None = getattr(values, "full_tensor", None)
    return values if gather is None else gather()


def _to_floats(vector: Tensor) -> list[float]:
    return cast("list[float]", vector.tolist())  # pyright: ignore[reportUnknownMemberType] # torch does not type it
