"""Reads the scales and shifts of all batch norm layers as a vector, with a single copy to the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_revbn.core.layers import BatchNormRecord
from lightning_revbn.core.metric_keys import AFFINE_KINDS

__all__ = ["AffineParameters", "Floats"]

Floats: TypeAlias = NDArray[np.float64]

_ATTRIBUTES = {"scale": "weight", "shift": "bias"}


class AffineParameters:
    """The scales and shifts of a model's batch norm layers, in the order in which `read` returns their values.

    Args:
        records: The layers; a layer without a scale or shift has no values of it.

    Attributes:
        names: Dotted names of the layers, for `"scale"` and for `"shift"`.
        channels: The number of channels of each named layer.
        dtype: The least precision that holds all values.
    """

    def __init__(self, records: Sequence[BatchNormRecord]) -> None:
        self.names: dict[str, list[str]] = {}
        self.channels: dict[str, list[int]] = {}
        self._parameters: list[Tensor] = []
        self._readers: dict[int, Callable[[], Tensor]] = {}
        for kind in AFFINE_KINDS:
            of_kind = [(record, getattr(record, kind)) for record in records]
            # A shard without elements has nothing to measure.
            held = [(record, own) for record, own in of_kind if own is not None and own.numel()]
            self.names[kind] = [record.name for record, _ in held]
            self.channels[kind] = [own.numel() for _, own in held]
            for record, own in held:
                self._add(record.module, _ATTRIBUTES[kind], own)
        self.dtype = functools.reduce(torch.promote_types, (own.dtype for own in self._parameters), torch.float16)
        # Memory that is used again: allocating some megabytes takes longer than filling them.
        channels = sum(map(sum, self.channels.values()))
        self._values = torch.empty(channels, dtype=torch.float64)

    def __len__(self) -> int:
        """Return how many scales and shifts there are."""
        return len(self._parameters)

    def read(self) -> Floats:
        """Return the values of all scales, then of all shifts, as a vector; the next call writes over it.

        If FSDP2 has sharded parameters, every rank must take part.
        """
        with torch.no_grad():
            parameters = self._parameters
            if self._readers:
                parameters = [self._readers[i]() if i in self._readers else own for i, own in enumerate(parameters)]
            if parameters:
                # Joined before the copy: on an accelerator every copy waits for all work before it. MPS has no float64,
                # so the precision is raised on the host.
                self._values.copy_(torch.cat(parameters).cpu())
        return cast("Floats", self._values.numpy())

    def _add(self, module: nn.Module, attribute: str, own: Tensor) -> None:
        device = self._parameters[0].device if self._parameters else own.device
        reader = _reader(module, attribute, own, device)
        if reader is not None:
            self._readers[len(self._parameters)] = reader
        self._parameters.append(own)


def _reader(module: nn.Module, attribute: str, own: Tensor, device: torch.device) -> Callable[[], Tensor] | None:
    """Return a function that gets the values of a parameter; None if it can be joined to others as it is."""
    if is_parametrized(module, attribute):  # the layer computes its values from the parameter
        return lambda: getattr(module, attribute).flatten().to(device)
    gather: Callable[[], Tensor] | None = getattr(own, "full_tensor", None)  # a DTensor, of which this is a shard
    if gather is not None:
        return lambda: gather().flatten().to(device)
    if own.dim() != 1 or own.device != device:
        return lambda: own.flatten().to(device)
    return None
