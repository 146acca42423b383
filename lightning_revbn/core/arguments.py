"""Checks of arguments: numbers, choices and name patterns, each with an error that says what to give instead.

Nothing is imported here but Python's own library, so that the command line checks patterns without torch.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

__all__ = [
    "ScaleSpec",
    "TrainedPolicy",
    "UnmatchedPatternError",
    "ZeroScalePolicy",
    "check_choice",
    "check_divisor",
    "check_patterns",
    "check_patterns_match",
    "check_scale",
    "nearest_names",
]

ZeroScalePolicy: TypeAlias = Literal["keep", "overwrite"]
TrainedPolicy: TypeAlias = Literal["keep", "overwrite", "error"]
ScaleSpec: TypeAlias = "float | Mapping[str, float]"


class UnmatchedPatternError(ValueError):
    """A name pattern that matches none of the layers; the message names the nearest layers."""


def check_patterns_match(argument: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise if a pattern matches no name.

    Args:
        argument: Name of the argument, for the message.
        patterns: `fnmatch` patterns.
        names: Dotted names of the batch norm layers; with none at all every pattern passes.

    Raises:
        UnmatchedPatternError: If a pattern matches none of the names.
    """
    for pattern in patterns if names else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UnmatchedPatternError(
                f"{argument}: the pattern {pattern!r} matches none of the model's {len(names)} batch norm layers; the "
                f"nearest names are {', '.join(map(repr, nearest_names(pattern, names)))}"
            )


def nearest_names(text: str, names: Sequence[str]) -> list[str]:
    """Find the names that a text was probably meant for.

    Args:
        text: What was given.
        names: What exists.

    Returns:
        Up to three names, the nearest first.
    """
    return difflib.get_close_matches(text, names, n=3, cutoff=0.0)


def check_scale(scale: ScaleSpec) -> ScaleSpec:
    """Return the scale, or say what is wrong with it.

    Args:
        scale: A number, or a mapping from name patterns to numbers.

    Returns:
        The same as floats; a mapping as a new dict in the same order.

    Raises:
        ValueError: If a number is not finite and positive, or the mapping is empty.
        TypeError: If it is neither a number nor a mapping of strings to numbers.
    """
    if isinstance(scale, Mapping):
        if not scale:
            raise ValueError('scale is an empty mapping: give at least one pattern, such as {"*": 0.1}')
        return {
            _check_pattern("scale", key): _check_scale_value(value, f"scale[{key!r}]") for key, value in scale.items()
        }
    return _check_scale_value(scale, "scale")


def check_choice(argument: str, value: object, choices: Iterable[object]) -> None:
    """Raise unless the value is one of the choices.

    Args:
        argument: Name of the argument, for the message.
        value: What was given.
        choices: What may be given.

    Raises:
        ValueError: If it is none of them.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{argument}={value!r} is unknown: use one of {', '.join(repr(choice) for choice in choices)}")


def check_patterns(argument: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return name patterns as a tuple; a single string counts as one pattern.

    Args:
        argument: Name of the argument, for the message.
        patterns: `fnmatch` patterns.

    Returns:
        The patterns.

    Raises:
        TypeError: If a pattern is no string.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    return tuple(_check_pattern(argument, pattern) for pattern in patterns)


def _check_pattern(argument: str, pattern: object) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"{argument} takes name patterns such as 'backbone.*', got {pattern!r}")
    return pattern


def _check_scale_value(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} must be a number above 0 (the method: below 1), got {value!r}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{where}={value!r} must be finite and positive; the method uses values below 1, such as 0.1")
    if value >= 1:
        warnings.warn(
            f"{where}={value!r}: the method starts batch norm scales below 1 (torch starts them at 1)", stacklevel=2
        )
    return float(value)


def check_divisor(divisor: float) -> float:
    """Return the divisor, or say what is wrong with it.

    Args:
        divisor: The constant c.

    Returns:
        The same as a float.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite and positive.
    """
    if isinstance(divisor, bool) or not isinstance(divisor, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"the divisor of the scales' learning rate must be a number, got {divisor!r}")
    if not math.isfinite(divisor) or divisor <= 0:
        raise ValueError(
            f"the divisor of the scales' learning rate must be finite and positive, got {divisor!r}; "
            "the paper uses 100, and 1 switches the rule off"
        )
    return float(divisor)
