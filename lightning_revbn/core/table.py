"""Draws a table of text: plain for logs and pipes, by rich for terminals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TextIO

__all__ = ["first_to_last", "plain_table", "print_table", "rich_table", "use_rich"]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], summary: str) -> None:
    """Print a table to stdout, by rich on a terminal, otherwise as plain text.

    Args:
        header: Names of the columns.
        rows: The cells, as many in each row as there are columns.
        summary: A sentence to close with.
    """
    if use_rich(sys.stdout):
        from rich.console import Console

        Console().print(rich_table(header, rows, summary))
    else:
        print(plain_table(header, rows, summary))  # noqa: T201


def use_rich(stream: TextIO) -> bool:
    """Tell whether rich draws for a stream.

    Args:
        stream: Such as `sys.stderr`.

    Returns:
        Whether the stream is a terminal and rich is installed.
    """
    return stream.isatty() and find_spec("rich") is not None


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], summary: str) -> str:
    """Draw a table as plain text.

    Args:
        header: Names of the columns.
        rows: The cells, as many in each row as there are columns.
        summary: A sentence to close with.

    Returns:
        Lines of text without a closing line break.

    Example:
        >>> print(plain_table(["Layer", "Scale"], [["bn1", "0.1"]], "1 layer"))
        Layer | Scale
        -------------
        bn1   | 0.1
        -------------
        1 layer
    """
    last = len(header) - 1
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(last)] + [0]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:], rule, summary])


def first_to_last(names: Sequence[str]) -> str:
    """Name the layers that one row stands for.

    Args:
        names: Their dotted names, `""` for the model itself.

    Returns:
        The name of a single layer; of several layers the first, the last and their number.

    Example:
        >>> first_to_last(["bn1"]), first_to_last(["bn1", "bn2", "bn3"])
        ('bn1', 'bn1 ... bn3 (3)')
    """
    first = names[0] or "(the model)"
    return first if len(names) == 1 else f"{first} ... {names[-1]} ({len(names)})"


def rich_table(header: Sequence[str], rows: Sequence[Sequence[str]], summary: str) -> object:
    """Draw the same for rich's console.

    Args:
        header: Names of the columns.
        rows: The cells.
        summary: A sentence to close with.

    Returns:
        A `rich.table.Table`.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, caption=summary)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # a layer's name is no markup
    return table
