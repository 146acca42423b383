"""Draws a table of text: plain for logs and pipes, by rich for terminals."""

from __future__ import annotations

from collections.abc import Sequence


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
