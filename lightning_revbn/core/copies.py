"""Finds copies of a network: target networks, momentum encoders, mean teachers, averages of weights.

Such a network is made by `copy.deepcopy`, is never trained, and follows the first network by a moving average. If only
the first network started at a small scale, the two would be different networks.

Fresh batch norm layers of the same width are all equal, so their own values prove no copy. The weights around them do:
random weights are equal to the bit only if they were copied.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from lightning_revbn.core.input_batch_norm import InputBatchNorm
from lightning_revbn.core.module_names import join, parent, unwrapped
from lightning_revbn.core.torch_compat import BatchNormBase

__all__ = ["Match", "find_copies", "networks_held_by"]

_Corner: TypeAlias = "tuple[torch.Size, tuple[float, ...]]"


@dataclass(frozen=True)
class Match:
    """A layer that looks like another layer of a network, with weights around it that were copied.

    Attributes:
        original: Name of the other layer.
        differs: Name of a tensor of the network around the layer that is not equal; None if the layer is a copy.
    """

    original: str
    differs: str | None


def find_copies(
    holder: nn.Module, layers: Iterable[str], module: nn.Module, originals: Collection[str]
) -> dict[str, Match]:
    """Find batch norm layers that are copies of the batch norm layers of a module.

    A layer and its original have the same name in the networks around them: `target.block.bn1` and `net.block.bn1` in
    `target` and `net`. The layer is a copy if all parameters and buffers that the two networks have in common are equal
    to the bit. Among them must be a weight outside of batch norm whose values vary. Parts that only one network has, or
    that have another shape, do not count: a copy may have another head, or none.

    Within the module itself only frozen weights prove a copy: two parts that are trained are two networks.

    Args:
        holder: The network to search: `module` itself, or another that may hold a copy of it or of a part of it.
        layers: Names of the layers in `holder` that may be copies.
        module: The network that may have been copied.
        originals: Names of its layers that may have been copied.

    Returns:
        Matches by the layer's name: copies, and layers of networks in which only some weights were copied.

    Example:
        >>> import copy
        >>> from torch import nn
        >>> model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))})
        >>> model["target"] = copy.deepcopy(model["net"]).requires_grad_(False)
        >>> find_copies(model, ["target.1"], model, ["net.1"])
        {'target.1': Match(original='net.1', differs=None)}
    """
    if not originals:
        return {}
    search = _Search(holder, module, originals)
    matches = {layer: search.match(layer) for layer in layers}
    return {layer: match for layer, match in matches.items() if match is not None}


def networks_held_by(owner: object) -> Iterator[nn.Module]:
    """List the modules that an object holds, as a callback holds the average of a network.

    Args:
        owner: The object.

    Yields:
        Modules in its attributes, in lists, tuples and dicts there, and in the attributes of other objects there (a
        plain object often keeps an average).
    """
    values: list[object] = list(vars(owner).values())
    for value in values:
        if isinstance(value, nn.Module):
            yield value
            continue
        inner: Iterable[object] = ()
        if isinstance(value, Mapping):
            inner = cast("Mapping[object, object]", value).values()
        elif isinstance(value, (list, tuple)):
            inner = cast("Iterable[object]", value)
        elif not isinstance(value, (type, types.ModuleType, types.FunctionType)):
            inner = cast("dict[str, object]", getattr(value, "__dict__", {})).values()
        yield from [module for module in inner if isinstance(module, nn.Module)]


class _Network:
    """The parts and tensors of a network by name, each read once."""

    def __init__(self, root: nn.Module) -> None:
        norms = [layer for layer in root.modules() if isinstance(layer, (BatchNormBase, InputBatchNorm))]
        of_norms = {id(parameter) for layer in norms for parameter in layer.parameters()}
        self._corners: dict[tuple[int, torch.dtype], _Corner] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._weights: dict[str, dict[str, Tensor]] = {}
        for path, tensor in (*root.named_parameters(), *root.named_buffers()):
            if not _is_plain(tensor):
                continue
            name = unwrapped(path)
            may_prove = id(tensor) not in of_norms and tensor.is_floating_point() and self._varies(tensor)
            part = name
            while part:
                part = parent(part)
                in_part = name[len(part) :].lstrip(".")
                self._tensors.setdefault(part, {})[in_part] = tensor
                if may_prove:
                    self._weights.setdefault(part, {})[in_part] = tensor

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return the parameters and buffers of a part that can be compared, by their names in the part."""
        return self._tensors.get(part, {})

    def weights(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of a part that may prove a copy: their values vary, and no batch norm holds them."""
        return self._weights.get(part, {})

    def corner(self, tensor: Tensor, dtype: torch.dtype) -> _Corner:
        """Return the shape and up to two values along each dimension: enough to tell random weights apart."""
        key = (id(tensor), dtype)
        if key not in self._corners:
            corner = tensor.detach()[tuple(slice(2) for _ in tensor.shape)].to(dtype)
            values = cast("list[float]", corner.flatten().tolist())  # pyright: ignore[reportUnknownMemberType]
            self._corners[key] = tensor.shape, tuple(values)
        return self._corners[key]

    def _varies(self, tensor: Tensor) -> bool:
        """Tell whether the values of a tensor differ."""
        if len(set(self.corner(tensor, tensor.dtype)[1])) > 1:
            return True
        lowest, highest = torch.aminmax(tensor.detach())
        return lowest.item() != highest.item()


class _Search:
    """Searches a network for copies of the parts of another network, or of its own parts."""

    def __init__(self, holder: nn.Module, module: nn.Module, originals: Collection[str]) -> None:
        self._inside = holder is module
        self._copies = _Network(holder)
        self._network = self._copies if self._inside else _Network(module)
        self._originals = frozenset(originals)
        self._by_corner: dict[torch.dtype, dict[_Corner, list[str]]] = {}
        self._alike: dict[str, list[str]] = {}
        self._compared: dict[tuple[str, str], str | None] = {}
        self._equal: dict[tuple[int, int], bool] = {}

    def match(self, layer: str) -> Match | None:
        """Return the match with a layer's original, or else the first match in which a tensor differs."""
        part, near = layer, None
        while part:
            part = parent(part)
            for other in self._parts_like(part):
                original = join(other, layer[len(part) :].lstrip("."))
                if original not in self._originals or not self._is_same_layer(layer, original):
                    continue
                match = Match(original, self._difference(*_networks_around(layer, original)))
                if match.differs is None:
                    return match
                near = near or match
        return near

    def _parts_like(self, part: str) -> list[str]:
        """List the parts of the network with a weight that begins like the weight of the same name in `part`."""
        if part not in self._alike:
            found: dict[str, None] = {}
            for name, weight in self._copies.weights(part).items():
                corner = self._copies.corner(weight, weight.dtype)
                for path in self._index(weight.dtype).get(corner, ()):
                    other = path[: -len(name)].rstrip(".")
                    if join(other, name) == path and self._is_copied(weight, self._network.weights("")[path]):
                        found[other] = None
            self._alike[part] = list(found)
        return self._alike[part]

    def _index(self, dtype: torch.dtype) -> dict[_Corner, list[str]]:
        """Return the names of the network's weights by their corners, in the precision of a copy."""
        if dtype not in self._by_corner:
            index = self._by_corner.setdefault(dtype, {})
            for path, weight in self._network.weights("").items():
                index.setdefault(self._network.corner(weight, dtype), []).append(path)
        return self._by_corner[dtype]

    def _is_same_layer(self, layer: str, original: str) -> bool:
        copies, own = self._copies.tensors(layer), self._network.tensors(original)
        counter = {"num_batches_tracked"}  # frozen batch norm layers, whose tensors are all buffers, lack it
        return copies.keys() - counter == own.keys() - counter and all(
            self._is_equal(copies[name], own[name]) for name in copies.keys() & own.keys()
        )

    def _difference(self, network: str, other: str) -> str | None:
        """Return the name of the first tensor of a network that differs in the other; None if there is none."""
        pair = (network, other)
        if pair not in self._compared:
            copies, own = self._copies.tensors(network), self._network.tensors(other)
            common = (name for name in copies if name in own and copies[name].shape == own[name].shape)
            different = (join(network, name) for name in common if not self._is_equal(copies[name], own[name]))
            self._compared[pair] = next(different, None)
        return self._compared[pair]

    def _is_equal(self, copy: Tensor, original: Tensor) -> bool:
        pair = (id(copy), id(original))
        if pair not in self._equal:
            self._equal[pair] = _is_equal(copy, original)
        return self._equal[pair]

    def _is_copied(self, copy: Tensor, original: Tensor) -> bool:
        """Tell whether equal weights are a copy and its original, rather than a weight that two parts share."""
        # Within a module, fixed kernels may be equal in all parts, and two equal parts may both be trained.
        trains = original.requires_grad and not copy.requires_grad
        return copy.data_ptr() != original.data_ptr() and (trains or not self._inside)


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor has all its values here: not lazy, sharded, partitioned, sparse or on the meta device."""
    known = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
    return known and tensor.layout == torch.strided and tensor.numel() > 0


def _is_equal(copy: Tensor, original: Tensor) -> bool:
    """Compare every value; an average may be kept on another device or in another precision."""
    if copy.shape != original.shape:
        return False
    if copy.data_ptr() == original.data_ptr() and copy.dtype == original.dtype:
        # Views of the same memory need no comparison of values.
        return copy.stride() == original.stride()
    return torch.equal(copy.detach(), original.detach().to(copy.device, copy.dtype))


def _networks_around(layer: str, original: str) -> tuple[str, str]:
    """Return the names of the largest parts in which a layer and its original have the same name."""
    left, right = layer.split("."), original.split(".")
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return ".".join(left), ".".join(right)
