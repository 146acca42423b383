"""Finds a tensor in a batch of any structure, and replaces it in a shallow copy."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_revbn.core.batch_places import Place, Step, path_of, place_of

__all__ = ["exact_path", "find_tensor", "is_sequence", "replace_tensor", "tensors_in", "usual_place"]


def find_tensor(batch: Any, place: Place | None, argument: str) -> Tensor | None:
    """Return a tensor of a batch.

    Args:
        batch: A tensor, tuple, list, mapping or any object with attributes.
        place: An index, a key or the name of an attribute, or a path of these; None is the place of `usual_place`.
        argument: The name of the setting that holds the place, for the message.

    Returns:
        The tensor; None if the batch has None there or on the way, as in batches of a `CombinedLoader` after one of its
        loaders has ended.

    Raises:
        TypeError: If the place does not lead to a tensor. The message describes the batch.
    """
    # Place 0 of `(input, target)` must also suit loaders that return the input alone, where it is not the first sample.
    if isinstance(batch, Tensor) and place == 0:
        return batch
    named = f"InputNorm({argument}={place!r})"
    values: Any = batch
    try:
        for step in path_of(usual_place(batch) if place is None else place):
            if values is None:
                return None
            values = _at(values, step)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise TypeError(f"{named} names no place in the batch, {_describe(batch)}") from error
    if values is not None and not isinstance(values, Tensor):
        inside = ", ".join(repr(found) for found, _ in tensors_in(batch))
        raise TypeError(
            f"the input must be a tensor, but {named} leads to {_describe(values)} in a batch "
            f"that is {_describe(batch)}. Name it by {argument}, or override select_input and replace_input"
            + (f". The batch has tensors at {inside}" if inside else "")
        )
    return values


def replace_tensor(batch: Any, place: Place | None, value: Tensor) -> Any:
    """Return a batch with another tensor at a place.

    Args:
        batch: The batch; it is not changed.
        place: The place of the tensor, as in `find_tensor`.
        value: The new tensor.

    Returns:
        A shallow copy of the same type. The containers on the path to the tensor are copied too.
    """
    if isinstance(batch, Tensor):
        return value
    return _replaced(batch, path_of(usual_place(batch) if place is None else place), value)


def usual_place(batch: Any) -> Place:
    """Return the place of the input in a batch if the user names none.

    Args:
        batch: The batch.

    Returns:
        The first element of a tuple or list, the only tensor of a mapping, or else the batch itself.
    """
    if _is_mapping(batch):
        keys = [key for key, value in batch.items() if isinstance(value, Tensor)]
        return keys[0] if len(keys) == 1 else ()
    return 0 if is_sequence(batch) and len(batch) else ()


def exact_path(batch: Any, place: Place | None) -> tuple[Step, ...]:
    """Return the path to a place, written the same way for all places that lead to the same tensor of this batch.

    Args:
        batch: The batch.
        place: A place that leads to a tensor or None in it.

    Returns:
        The path with every index of a tuple or list counted from the front, fields of named tuples included.

    Example:
        >>> exact_path((1, 2), -1), exact_path([{"views": (1, 2)}], (0, "views", -2))
        ((1,), (0, 'views', 0))
    """
    if isinstance(batch, Tensor):
        return ()
    path: list[Step] = []
    values: Any = batch
    for step in path_of(usual_place(batch) if place is None else place):
        exact = step
        if isinstance(step, str) and step in getattr(values, "_fields", ()):
            exact = values._fields.index(step)
        elif isinstance(step, int) and step < 0 and is_sequence(values):
            exact = len(values) + step
        path.append(exact)
        values = None if values is None else _at(values, step)
    return tuple(path)


def tensors_in(batch: Any, path: tuple[Step, ...] = ()) -> Iterator[tuple[Place, Tensor]]:
    """Yield the tensors of a batch with their places, in the order of the batch.

    Args:
        batch: Tensors in tuples, lists, mappings and dataclasses.
        path: The path of the batch within a larger batch.

    Yields:
        A place and its tensor.
    """
    if isinstance(batch, Tensor):
        yield place_of(path), batch
        return
    parts: Any = ()
    if _is_mapping(batch):
        parts = batch.items()
    elif is_sequence(batch):
        parts = enumerate(batch)
    elif dataclasses.is_dataclass(batch):
        parts = ((field.name, getattr(batch, field.name, None)) for field in dataclasses.fields(batch))
    for step, part in parts:
        yield from tensors_in(part, (*path, step))


def is_sequence(batch: Any) -> bool:
    """Tell whether a batch is a tuple or a list.

    Args:
        batch: The batch.

    Returns:
        True for tuples, named tuples and lists.
    """
    return isinstance(batch, (tuple, list))


def _replaced(batch: Any, path: tuple[Step, ...], value: Tensor) -> Any:
    """Return a batch with another tensor at a path."""
    if not path:
        return value
    step = path[0]
    new = _replaced(_at(batch, step), path[1:], value)
    if is_sequence(batch) and not isinstance(step, str):
        items = [*batch]
        items[step] = new
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if hasattr(batch, "_fields"):
        return batch._replace(**{str(step): new})
    changed = copy.copy(batch)
    if _is_mapping(batch) or not isinstance(step, str):
        changed[step] = new
    elif dataclasses.is_dataclass(batch) and batch.__dataclass_params__.frozen:  # type: ignore[attr-defined] # private
        return dataclasses.replace(batch, **{step: new})  # pyright: ignore[reportArgumentType, reportUnknownVariableType] # any one
    else:
        setattr(changed, step, new)
    return changed


def _at(batch: Any, step: Step) -> Any:
    if isinstance(batch, Tensor):
        raise TypeError("a tensor is not a container: its first index is a sample")
    if isinstance(step, str) and not _is_mapping(batch):
        return getattr(batch, step)
    return batch[step]


def _is_mapping(batch: Any) -> bool:
    return isinstance(batch, Mapping)


def _describe(batch: Any) -> str:
    """Return a description of a batch for messages: its type, and its keys or the types of its elements."""
    name = type(batch).__name__
    if _is_mapping(batch):
        return f"a {name} with the keys {', '.join(map(repr, batch))}"
    if is_sequence(batch):
        return f"a {name} of ({', '.join(type(part).__name__ for part in batch)})"
    return f"a {name}"
