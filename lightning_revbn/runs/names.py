"""Sorts names of runs, layers and metrics in natural order, and shortens them to their ends or to a line.

Imports only Python's standard library.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["natural", "one_line", "shared_parts", "suffixes"]


def one_line(text: object, limit: int = 400) -> str:
    """Fit a text from outside into the single line of an error.

    Args:
        text: A path, or a key from a file.
        limit: Characters at most; a longer text loses its middle.

    Returns:
        The text, with `?` for characters that cannot be printed.
    """
    line = "".join(char if char.isprintable() else "?" for char in str(text))
    return line if len(line) <= limit else f"{line[: limit // 2 - 1]}...{line[2 - limit // 2 :]}"


def natural(text: str) -> tuple[tuple[int, str], ...]:
    """Return a key that sorts numbers inside texts by value.

    Args:
        text: The text.

    Returns:
        The key.

    Example:
        >>> sorted(["layer10", "layer9"], key=natural)
        ['layer9', 'layer10']
    """
    parts = re.split(r"([0-9]+)", text)
    # Numbers compare by length, then digit by digit: int() would refuse more than 4,300 digits.
    return tuple((len(part.lstrip("0")), part.lstrip("0")) if i % 2 else (0, part) for i, part in enumerate(parts))


def shared_parts(names: Sequence[Sequence[str]]) -> list[str]:
    """Return the leading parts that all names share.

    Args:
        names: Names, each split into parts.

    Returns:
        The parts.

    Example:
        >>> shared_parts([["layer1", "0", "bn1"], ["layer1", "10", "bn1"]])
        ['layer1']
    """
    return [parts[0] for parts in itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*names, strict=False))]


def suffixes(paths: Sequence[Path]) -> list[str]:
    """Name paths by their ends.

    Args:
        paths: Different paths.

    Returns:
        The last parts of each path, as many for all as are needed to tell the paths apart.

    Example:
        >>> suffixes([Path("/logs/baseline/version_0"), Path("/logs/revisited/version_0")])
        ['baseline/version_0', 'revisited/version_0']
    """
    # resolve() follows links, which would replace names that the user knows.
    parts = [(path.resolve() if ".." in path.parts else path.absolute()).parts for path in paths]
    longest = max(map(len, parts))
    names = [["/".join(part[-count:]) for part in parts] for count in range(1, longest + 1)]
    return next((ends for ends in names if len(set(ends)) == len(ends)), names[-1])
