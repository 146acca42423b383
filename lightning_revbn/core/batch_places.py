"""The names of places in a batch: an index, a key, an attribute, a path of these, or a list of places."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias, cast

__all__ = ["Key", "Place", "Step", "check_key", "path_of", "place_of", "places_in"]

Step: TypeAlias = int | str
"""One step into a batch: an index, a key of a mapping, or the name of an attribute."""

Place: TypeAlias = int | str | tuple[int | str, ...]
"""One step, or a path of steps; the empty path is the batch itself."""

# list is first in the union: a configuration file has no tuples, so LightningCLI must read a sequence there as a list
# of places, before it tries a tuple, which is a path.
Key: TypeAlias = list[int | str | tuple[int | str, ...]] | int | str | tuple[int | str, ...] | None
"""A place, a list of places, or None for the usual place of an input (see `InputNorm.key`)."""


def check_key(name: str, key: object) -> Key:
    """Check a key of the settings: a list is copied, and lists within it become paths.

    Args:
        name: The name of the setting, for the message.
        key: The value that the user gave.

    Returns:
        The key.

    Raises:
        ValueError: If the value is not a key, or names a place twice.

    Example:
        >>> check_key("key", [0, ["views", 1]])
        [0, ('views', 1)]
    """
    if not isinstance(key, list):
        if key is None or _is_place(key):
            return cast("Key", key)
        raise ValueError(f"{name}={key!r} must be an index, a key or attribute, a tuple or a list of these, or None")
    given = cast("list[object]", key)
    places = [tuple(cast("list[object]", place)) if isinstance(place, list) else place for place in given]
    if not places or not all(map(_is_place, places)):
        raise ValueError(f"{name}={key!r} must list places: indices, keys or attributes, or tuples of them")
    good = cast("list[Place]", places)
    if len({path_of(place) for place in good}) < len(good):
        raise ValueError(f"{name}={key!r} names a place twice")
    return good


def places_in(key: Key) -> list[Place | None]:
    """Return the places that a key names; for the key None, a list with None."""
    return [*key] if isinstance(key, list) else [key]


def path_of(place: Place) -> tuple[Step, ...]:
    """Return a place as a path."""
    return place if isinstance(place, tuple) else (place,)


def place_of(path: Iterable[Step]) -> Place:
    """Return a path as a user writes it: a single step without a tuple, several as a tuple."""
    steps = tuple(path)
    return steps[0] if len(steps) == 1 else steps


def _is_place(value: object) -> bool:
    steps = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
    return all(isinstance(step, (int, str)) and not isinstance(step, bool) for step in steps)
