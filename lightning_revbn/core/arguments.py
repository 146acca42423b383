"""Checks arguments: numbers, choices and name patterns, each with an error that says what to give instead.

This module imports only Python's own library, so that the command line checks patterns without torch.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Literal, TypeAlias, cast

__all__ = [
    "ScaleSpec",
    "TrainedPolicy",
    "UnmatchedPatternError",
    "ZeroScalePolicy",
    "as_integer",
    "as_number",
    "check_choice",
    "check_divisor",
    "check_eps",
    "check_multiplier",
    "check_patterns",
    "check_patterns_match",
    "check_scale",
    "is_flat",
    "matching_names",
    "nearest_names",
]

ZeroScalePolicy: TypeAlias = Literal["keep", "overwrite"]
TrainedPolicy: TypeAlias = Literal["keep", "overwrite", "error"]
ScaleSpec: TypeAlias = "float | Mapping[str, float]"


class UnmatchedPatternError(ValueError):
    """A name pattern matches none of the layers; the message names the nearest layers."""


def check_patterns_match(argument: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise if a pattern matches no name.

    Args:
        argument: Name of the argument, for the message.
        patterns: `fnmatch` patterns.
        names: Dotted names of the batch norm layers; without any names, every pattern passes.

    Raises:
        UnmatchedPatternError: If a pattern matches none of the names.
    """
    for pattern in patterns if names else ():
        if not matching_names([pattern], names):
            raise UnmatchedPatternError(
                f"{argument}: the pattern {pattern!r} matches none of the model's {len(names)} batch norm layers; the "
                f"nearest names are {', '.join(map(repr, nearest_names(pattern, names)))}"
            )


def matching_names(patterns: Iterable[str], names: Collection[str]) -> set[str]:
    """Find the names that match any of the patterns; this function reads every pattern of the package.

    Args:
        patterns: `fnmatch` patterns. A pattern that equals a name matches this name alone: a name such as
            `stages[0].bn` is also a pattern, which would match `stages0.bn`.
        names: Dotted names.

    Returns:
        The names that match.

    Example:
        >>> sorted(matching_names(["a[0]"], ["a[0]", "a0"])), sorted(matching_names(["a[01]"], ["a[0]", "a0"]))
        (['a[0]'], ['a0'])
    """
    found: set[str] = set()
    for pattern in patterns:
        # `fnmatch` would ignore the case of names on some systems.
        found.update({pattern} if pattern in names else {name for name in names if fnmatchcase(name, pattern)})
    return found


def nearest_names(text: str, names: Sequence[str]) -> list[str]:
    """Find the names that a text was probably meant for.

    Args:
        text: The given text.
        names: The names that exist.

    Returns:
        Up to three names, the nearest first.
    """
    return difflib.get_close_matches(text, names, n=3, cutoff=0.0)


def check_scale(scale: ScaleSpec) -> ScaleSpec:
    """Check the scale.

    Args:
        scale: A number, or a mapping from name patterns to numbers.

    Returns:
        The scale as floats; a mapping as a new dict in the same order.

    Raises:
        ValueError: If a number is not finite and positive, or the mapping is empty.
        TypeError: If the scale is neither a number nor a mapping of strings to numbers.
    """
    if isinstance(scale, Mapping):
        if not scale:
            raise ValueError('scale is an empty mapping: give a pattern, such as {"*": 0.1}')
        return {
            _check_pattern("scale", key): _check_scale_value(value, f"scale[{key!r}]") for key, value in scale.items()
        }
    return _check_scale_value(scale, "scale")


def check_choice(argument: str, value: object, choices: Iterable[object]) -> None:
    """Raise unless the value is among the choices.

    Args:
        argument: Name of the argument, for the message.
        value: The given value.
        choices: The allowed values.

    Raises:
        ValueError: If the value is not allowed.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(
            f"{argument}={value!r} is unknown: choose from {', '.join(repr(choice) for choice in choices)}"
        )


def check_patterns(argument: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return name patterns as a tuple; a string counts as a single pattern.

    Args:
        argument: Name of the argument, for the message.
        patterns: `fnmatch` patterns.

    Returns:
        The patterns.

    Raises:
        TypeError: If a pattern is not a string.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    return tuple(_check_pattern(argument, pattern) for pattern in patterns)


def _check_pattern(argument: str, pattern: object) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"{argument} takes name patterns such as 'backbone.*', got {pattern!r}")
    return pattern


def _check_scale_value(value: object, where: str) -> float:
    number = as_number(value)
    if number is None:
        raise TypeError(f"{where} must be a number above 0 (the method: below 1), got {value!r}")
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{where}={value!r} must be finite and positive; the method uses values below 1, such as 0.1")
    if number > 1:
        warnings.warn(
            f"{where}={value!r}: the method starts batch norm scales below 1 (torch starts them at 1)", stacklevel=2
        )
    return number


def check_divisor(divisor: float) -> float:
    """Check the divisor.

    Args:
        divisor: The constant c.

    Returns:
        The divisor as a float.

    Raises:
        TypeError: If the divisor is not a number.
        ValueError: If the divisor is not finite and positive.
    """
    return _check_factor(divisor, "the divisor of the scales", "the paper uses 100, and 1 switches the rule off")


def check_multiplier(multiplier: float) -> float:
    """Check the multiplier.

    Args:
        multiplier: The factor k.

    Returns:
        The multiplier as a float.

    Raises:
        TypeError: If the multiplier is not a number.
        ValueError: If the multiplier is not finite and positive.
    """
    return _check_factor(multiplier, "the multiplier of the shifts", "1 leaves the shifts alone")


def check_eps(eps: float | None) -> float | None:
    """Check eps.

    Args:
        eps: The number that batch norm layers add to variances; None for their own.

    Returns:
        eps as a float, or None.

    Raises:
        TypeError: If eps is not a number.
        ValueError: If eps is not finite and positive.
    """
    if eps is None:
        return None
    number = as_number(eps)
    if number is None:
        raise TypeError(f"eps must be a number such as 1e-3, or None to leave the eps of the layers, got {eps!r}")
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"eps={eps!r} must be finite and positive: torch's default is 1e-5, TensorFlow's 1e-3")
    return number


def _check_factor(value: object, factor: str, advice: str) -> float:
    number = as_number(value)
    if number is None:
        raise TypeError(f"{factor}' learning rate must be a number, got {value!r}")
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{factor}' learning rate must be finite and positive, got {value!r}; {advice}")
    return number


def as_number(value: object) -> float | None:
    """Read a number in any form in which users have it.

    Args:
        value: A number of Python or NumPy, an array without dimensions, or a text: PyYAML reads `1e-1`, which lacks the
            dot, as a text.

    Returns:
        The number as a float; None for a bool and for any other value that is not a number.

    Example:
        >>> as_number("1e-1"), as_number("big"), as_number(True)
        (0.1, None, None)
    """
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    item: object = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        value = item()  # NumPy is not imported for its types: their Python value tells a bool from a number
    return None if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def as_integer(value: object) -> int | None:
    """Read a whole number of Python or NumPy, or an array of whole numbers without dimensions.

    Args:
        value: The number.

    Returns:
        The number as an int; None for a bool and for any other value that is not a whole number.

    Example:
        >>> as_integer(3), as_integer(3.0), as_integer(True)
        (3, None, None)
    """
    item: object = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        value = item()
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_flat(value: object) -> bool:
    """Tell whether a value from a file is a setting: a plain value, or a list or mapping of plain values.

    In a few lines, YAML or a pickle can nest shared lists to 10^9 values, which no error text may quote.

    Args:
        value: Any value.

    Returns:
        True if so.

    Example:
        >>> is_flat({"*": 0.1}), is_flat(["*.bn1"]), is_flat([[0.1]])
        (True, True, False)
    """
    plain = (bool, int, float, str, type(None))
    if isinstance(value, Mapping):
        items: list[object] = [*cast("Mapping[object, object]", value).items()]
        return all(isinstance(own, plain) for item in items for own in cast("tuple[object, object]", item))
    if isinstance(value, (list, tuple)):
        return all(isinstance(own, plain) for own in cast("Sequence[object]", value))
    return isinstance(value, plain)
