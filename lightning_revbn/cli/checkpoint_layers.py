"""Finds the batch norm layers of a state dict, and the reason why an odd layer cannot be judged."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_revbn.core.module_names import unwrapped
from lightning_revbn.core.printable import error_text

__all__ = ["BatchNorm", "Modules", "OddLayer", "from_state_dict", "known_layers"]


class Modules(nn.Module):
    """Modules by name, without a tree: a tree of modules refuses some names that a checkpoint may hold.

    A tree refuses a part called `type` or `train`, an empty part as in `a..b`, and a name of 5,000 levels.

    Args:
        modules: Any modules by dotted name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._named = dict(modules)

    @override
    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[Any, None, None]:
        yield from self._named.items()


class BatchNorm(nn.BatchNorm1d):
    """A batch norm layer of a checkpoint; a checkpoint does not tell whether the layer has 1, 2 or 3 dimensions.

    The layer holds the checkpoint's own tensors. Of a tensor that repeats a number, it holds the number once.
    """

    def __init__(self, tensors: Mapping[str, Tensor], eps: float | None) -> None:
        super().__init__(1, affine=False, track_running_stats=False)  # pyright: ignore[reportUnknownMemberType] # torch types it in part
        # Torch's own tensors would take memory, and the checkpoint's replace them.
        self.num_features = tensors["running_mean"].numel()
        self.eps = eps  # pyright: ignore[reportAttributeAccessIssue] # unknown, as no state dict has it
        for name, tensor in tensors.items():
            values = _numbers(tensor)
            setattr(self, name, nn.Parameter(values) if name in ("weight", "bias") else values)


class OddLayer:
    """A part of a checkpoint that looks like a batch norm layer, and cannot be judged.

    Args:
        channels: The number of channels that it seems to have.
        reason: The reason why it cannot be judged.
    """

    def __init__(self, channels: int, reason: str) -> None:
        self.channels = channels
        self.reason = reason


def from_state_dict(
    tensors: Mapping[str, Tensor], eps: Mapping[str, float] | None = None
) -> dict[str, BatchNorm | OddLayer]:
    """Find the batch norm layers of a state dict.

    Running statistics identify a layer. A batch norm without them looks like any other norm, so it is not found. A
    frozen layer, or an instance norm with running statistics, looks like a batch norm, so it is found.

    Args:
        tensors: The model's tensors by name.
        eps: The known eps of layers by name.

    Returns:
        The layers by name, in the order of the state dict.
    """
    eps = eps or {}
    layers: dict[str, BatchNorm | OddLayer] = {}
    for key in tensors:
        name, _, attribute = key.rpartition(".")
        before = key.removesuffix("running_mean")
        if attribute != "running_mean" or f"{before}running_var" not in tensors:
            continue
        own = {part: tensors[f"{before}{part}"] for part in _PARTS if f"{before}{part}" in tensors}
        reason = _oddity(own)
        channels = 0 if own["running_mean"].is_nested else own["running_mean"].numel()
        layers[name] = BatchNorm(own, eps.get(unwrapped(name))) if reason is None else OddLayer(channels, reason)
    return layers


def known_layers(layers: Mapping[str, BatchNorm | OddLayer]) -> Modules:
    """Return the layers that can be judged, as a module for `find_batch_norms`.

    Args:
        layers: The result of `from_state_dict`.

    Returns:
        A module without the odd layers.
    """
    return Modules({name: layer for name, layer in layers.items() if isinstance(layer, BatchNorm)})


_PARTS = {
    "running_mean": "running mean",
    "running_var": "running variance",
    "weight": "weight",
    "bias": "bias",
    "num_batches_tracked": "number of batches",
}


def _oddity(tensors: Mapping[str, Tensor]) -> str | None:
    """Say why the tensors are not a batch norm layer that can be judged; None if they are."""
    for part, tensor in tensors.items():
        fault = _fault(tensor, is_count=part == "num_batches_tracked")
        if fault is not None:
            return f"its {_PARTS[part]} {fault}"
    shape = tensors["running_mean"].shape
    if len(shape) != 1 or not shape.numel():
        return f"its running mean has shape {tuple(shape)}, not a value a channel"
    for part, tensor in tensors.items():
        wanted = () if part == "num_batches_tracked" else shape
        if tensor.shape != wanted and not (part == "num_batches_tracked" and tensor.numel() == 1):
            return f"its {_PARTS[part]} has shape {tuple(tensor.shape)}, its running mean {tuple(shape)}"
    return None


def _fault(tensor: Tensor, *, is_count: bool) -> str | None:
    """Say why a tensor has no readable numbers, or numbers that no batch norm layer has; None if it is sound."""
    if tensor.is_meta:
        return "has no values: it was saved on the meta device"
    if tensor.is_quantized:
        return f"is quantised ({_short(tensor.dtype)})"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"is not a dense tensor ({'nested' if tensor.is_nested else _short(tensor.layout)})"
    if tensor.is_complex() or not (tensor.dtype.is_floating_point or is_count):
        return f"is {_short(tensor.dtype)}, no floating-point numbers"
    if is_count:
        return None
    try:
        _numbers(tensor)
    except (RuntimeError, TypeError) as error:
        return f"is {_short(tensor.dtype)}, which torch cannot read as numbers: {error_text(error, 200)}"
    return None


def _numbers(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor, a repeated number once, in a precision that torch computes in."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        # An expanded tensor in a small file can stand for gigabytes of equal numbers.
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    # torch cannot compute in float8.
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _short(kind: object) -> str:
    return str(kind).removeprefix("torch.")
