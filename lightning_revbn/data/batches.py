"""Finds a tensor in a batch of any structure, and replaces it in a shallow copy."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["Key", "is_sequence", "replace_tensor", "select_tensor"]

Key = int | str | None


def select_tensor(batch: Any, key: Key, argument: str) -> Tensor:
    """Return a tensor of a batch.

    Args:
        batch: A tensor, tuple, list, mapping or any object with attributes.
        key: An index, a key or the name of an attribute; None is the tensor itself, the first of a tuple or list, or
            the only tensor of a mapping.
        argument: What the key is called where the user gives it, for the message.

    Returns:
        The tensor.

    Raises:
        TypeError: If the key does not lead to one; the message says what the batch is.
    """
    try:
        values: Any = _at(batch, key)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise TypeError(f"InputNorm({argument}={key!r}) leads nowhere in a batch that is {_describe(batch)}") from error
    if not isinstance(values, Tensor):
        raise TypeError(
            f"the input must be a tensor, but InputNorm({argument}={key!r}) leads to {_describe(values)} in a batch "
            f"that is {_describe(batch)}. Name it by {argument}, or override select_input and replace_input"
        )
    return values


def replace_tensor(batch: Any, key: Key, value: Tensor) -> Any:
    """Return a batch with the tensor replaced that `select_tensor` returns.

    Args:
        batch: The batch; it is not changed.
        key: Where the tensor is.
        value: What takes its place.

    Returns:
        A shallow copy of the same type.
    """
    if isinstance(batch, Tensor):
        return value
    if is_sequence(batch) and not isinstance(key, str):
        items = [*batch]
        items[key or 0] = value
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if hasattr(batch, "_fields"):
        return batch._replace(**{str(key): value})
    if isinstance(key, str) and not _is_mapping(batch):
        if dataclasses.is_dataclass(batch) and batch.__dataclass_params__.frozen:  # type: ignore[attr-defined] # private
            return dataclasses.replace(batch, **{key: value})  # pyright: ignore[reportArgumentType, reportUnknownVariableType] # any one
        changed = copy.copy(batch)
        setattr(changed, key, value)
        return changed
    changed = copy.copy(batch)
    changed[_only_tensor(batch) if key is None else key] = value
    return changed


def is_sequence(batch: Any) -> bool:
    """Tell whether a batch is a tuple or a list.

    Args:
        batch: The batch.

    Returns:
        Whether it is.
    """
    return isinstance(batch, (tuple, list))


def _at(batch: Any, key: Key) -> Any:
    if key is None:
        if _is_mapping(batch):
            return batch.get(_only_tensor(batch))
        return batch[0] if is_sequence(batch) and len(batch) else batch
    if isinstance(key, str) and not _is_mapping(batch):
        return getattr(batch, key)
    return batch[key]


def _only_tensor(batch: Any) -> Any:
    """Return the key of the tensor of a mapping, if there is but one."""
    keys = [key for key, value in batch.items() if isinstance(value, Tensor)]
    return keys[0] if len(keys) == 1 else None


def _is_mapping(batch: Any) -> bool:
    return isinstance(batch, Mapping)


def _describe(batch: Any) -> str:
    """Say what a batch is."""
    name = type(batch).__name__
    if _is_mapping(batch):
        return f"a {name} with the keys {', '.join(map(repr, batch))}"
    if is_sequence(batch):
        return f"a {name} of ({', '.join(type(part).__name__ for part in batch)})"
    return f"a {name}"
