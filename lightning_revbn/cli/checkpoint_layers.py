"""The batch norm layers that a state dict shows, and the reason why a layer cannot be judged where it is an odd one."""

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
    """Modules by name. They make no tree, since names of a checkpoint may be names that no tree takes.

    A tree of modules takes no part called `type` or `train`, none without a name as in `a..b`, and no 5,000 levels.

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
    """A batch norm layer of a checkpoint, which does not tell whether it is for 1, 2 or 3 dimensions.

    It holds the tensors of the checkpoint themselves. Those that repeat one number are held as this number alone.
    """

    def __init__(self, tensors: Mapping[str, Tensor], eps: float | None) -> None:
        super().__init__(1, affine=False, track_running_stats=False)  # pyright: ignore[reportUnknownMemberType] # torch types it in part
        self.num_features = tensors["running_mean"].numel()
        self.eps = eps  # pyright: ignore[reportAttributeAccessIssue] # unknown, as no state dict has it
        for name, tensor in tensors.items():
            values = _numbers(tensor)
            setattr(self, name, nn.Parameter(values) if name in ("weight", "bias") else values)


class OddLayer:
    """What looks like a batch norm layer of a checkpoint, and cannot be judged.

    Args:
        channels: How many it seems to have.
        reason: Why not.
    """

    def __init__(self, channels: int, reason: str) -> None:
        self.channels = channels
        self.reason = reason


def from_state_dict(
    tensors: Mapping[str, Tensor], eps: Mapping[str, float] | None = None
) -> dict[str, BatchNorm | OddLayer]:
    """Find the batch norm layers that a state dict shows.

    A layer is known by its running statistics; one without them cannot be told from other norms, and a frozen layer
    or an instance norm with running statistics looks the same.

    Args:
        tensors: The model's tensors by name.
        eps: The eps of layers by name, where it is known.

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
    """Return the layers that can be judged, as `find_batch_norms` takes them.

    Args:
        layers: What `from_state_dict` has returned.

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
    """Say why tensors are not those of a batch norm layer with values to judge by; None if they are."""
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
    """Say why a tensor has no numbers to look at, or others than those of a batch norm layer; None if it has."""
    if tensor.is_meta:
        return "has no values: it was saved on the meta device"
    if tensor.is_quantized:
        return f"is quantised ({_short(tensor.dtype)})"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"is no dense tensor ({'nested' if tensor.is_nested else _short(tensor.layout)})"
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
    """Return the numbers of a tensor, one where a dimension repeats it, in a precision that torch computes in."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _short(kind: object) -> str:
    return str(kind).removeprefix("torch.")
