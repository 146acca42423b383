"""Finds lists that an optimizer pairs with its parameter groups by position, with an entry for each group.

`for group, base_lr in zip(self.param_groups, self.base_lrs)` trains wrongly without an error if a view shows more
groups than there are entries: `zip` leaves out the last groups.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_revbn.core.arguments import as_number
from lightning_revbn.core.param_groups import Group

__all__ = ["are_values_of", "lists_by_group", "tensors_by_group"]


def lists_by_group(optimizer: Optimizer) -> list[str]:
    """List the attributes of an optimizer that hold an entry for each of its parameter groups.

    The length of a list alone proves nothing: a pair of betas is as long as a list of two groups. So every entry must
    belong to its group: the learning rate of the group, a dict, or values for its parameters.

    Args:
        optimizer: The optimizer.

    Returns:
        Names of attributes, without torch's own attributes.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
        >>> optimizer.base_lrs = [0.1]
        >>> lists_by_group(optimizer)
        ['base_lrs']
    """
    groups: list[Group] = optimizer.param_groups
    found: list[str] = []
    for name, value in vars(optimizer).items():
        entries = None if name in _TORCHS_OWN else _entries(value, len(groups))
        if entries and all(_belongs(entry, group) for entry, group in zip(entries, groups, strict=True)):
            found.append(name)
    return found


def tensors_by_group(optimizer: Optimizer) -> list[str]:
    """List the attributes among `lists_by_group` that hold tensors for the parameters of each group.

    Numbers and dicts may only serve a log. Values of parameters serve the update, which need not read them at its first
    step: Lookahead reads them at every k-th step.

    Args:
        optimizer: The optimizer.

    Returns:
        Names of attributes.
    """
    attributes = vars(optimizer)
    groups: list[Group] = optimizer.param_groups
    found: list[str] = []
    for name in lists_by_group(optimizer):
        first, *_ = _entries(attributes[name], len(groups)) or [None]
        if are_values_of(first, groups[0]["params"]):
            found.append(name)
    return found


def are_values_of(value: object, params: Sequence[Tensor]) -> bool:
    """Tell whether a value belongs to several parameters in their order.

    Args:
        value: Any value.
        params: The parameters.

    Returns:
        True for a tensor with as many elements as all the parameters, and for a list with a tensor of each parameter's
        shape. False for a single parameter, since such values may well be a setting.
    """
    if len(params) < 2:
        return False
    if isinstance(value, Tensor):
        return value.ndim > 0 and value.numel() == sum(parameter.numel() for parameter in params)
    return isinstance(value, (list, tuple)) and _are_shaped_alike(cast("Sequence[object]", value), params)


def _entries(value: object, count: int) -> list[Any] | None:
    """Return the entries of a container with an entry for each group, by position or by number."""
    if isinstance(value, dict):
        numbered = cast("dict[Any, Any]", value)
        return [numbered[index] for index in range(count)] if set(numbered) == set(range(count)) else None
    if isinstance(value, (np.ndarray, Tensor)):
        entries: list[Any] = list(cast("Sequence[Any]", value)) if value.ndim else []
        return entries if len(entries) == count else None
    if isinstance(value, (list, tuple, deque)):
        entries = list(cast("Sequence[Any]", value))
        return entries if len(entries) == count else None
    return None


def _belongs(entry: object, group: Group) -> bool:
    """Tell whether an entry is about a group, rather than a number that happens to stand in its place."""
    if isinstance(entry, dict):
        return True
    params: list[Tensor] = group["params"]
    if isinstance(entry, Tensor) and entry.ndim:
        return entry.numel() == sum(parameter.numel() for parameter in params)
    if isinstance(entry, (list, tuple)):
        return _are_shaped_alike(cast("Sequence[object]", entry), params)
    number = None if isinstance(entry, str) else as_number(entry)
    return number is not None and number in (as_number(group.get("lr")), as_number(group.get("initial_lr")))


def _are_shaped_alike(parts: Sequence[object], params: Sequence[Tensor]) -> bool:
    return len(parts) == len(params) and all(
        isinstance(part, Tensor) and part.shape == parameter.shape
        for part, parameter in zip(parts, params, strict=True)
    )


_TORCHS_OWN = frozenset(vars(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)))
"""Attributes of every optimizer, `param_groups` and `state` among them."""
