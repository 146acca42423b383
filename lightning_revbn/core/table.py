"""Draws a table of text: plain for logs and pipes, with rich for terminals. No cell is ever cut."""

from __future__ import annotations

import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, TextIO

from lightning_revbn.core.printable import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

__all__ = ["first_to_last", "plain_table", "print_table", "rich_table", "use_rich"]

_LEAST_PROSE = 20
"""The fewest characters per line in which a sentence of the last column can still be read."""
_LEAST_WIDTH = 20
_NOTHING = ("", "-")
"""Cells without a value."""


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], summary: str, spare: Sequence[Sequence[int]] = ()
) -> None:
    """Print a table to stdout: on a terminal with rich, if it is installed, otherwise as plain text.

    A pipe gets every column, with a line per row. A terminal never cuts a cell. If the table is too wide, columns with
    the same cell in every row move into a line below the table. Then columns are left out in the order of `spare`, and
    the last column is wrapped. If all this does not help, the cells of a row are printed below each other.

    Args:
        header: Names of the columns; the first tells rows apart, the last may be prose.
        rows: The cells, as many in each row as there are columns.
        summary: A sentence to close with.
        spare: Groups of columns, by position, that a narrow terminal does without; the first group goes first.
    """
    if use_rich(sys.stdout):
        from rich.console import Console

        Console().print(rich_table(header, rows, summary, spare))
    else:
        width = shutil.get_terminal_size().columns if _is_terminal(sys.stdout) else None
        print(plain_table(header, rows, summary, spare, width))  # noqa: T201


def use_rich(stream: TextIO | None) -> bool:
    """Tell whether rich draws for a stream.

    Args:
        stream: A stream such as `sys.stderr`, which is None if a process was started without it.

    Returns:
        Whether the stream is a terminal and rich is installed.
    """
    return _is_terminal(stream) and find_spec("rich") is not None


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def plain_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    summary: str,
    spare: Sequence[Sequence[int]] = (),
    width: int | None = None,
) -> str:
    """Draw a table as plain text.

    Args:
        header: Names of the columns.
        rows: The cells, as many in each row as there are columns.
        summary: A sentence to close with.
        spare: As in `print_table`.
        width: Characters in a line; None takes as many as the table needs.

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
    table = _Table.of(header, rows, spare)
    # Nothing surrounds plain columns, and no separator follows the last column.
    shown = table if width is None else table.fitted(width, outside=-3)
    lines = [*shown.lines(width)] if shown.is_stacked else _aligned([shown.header, *shown.rows], shown.prose)
    rule = "-" * min(max(map(_cells, lines)), width or sys.maxsize)
    if not shown.is_stacked:
        lines.insert(1, rule)
    return "\n".join([*lines, rule, *shown.notes, printable(summary)])


def rich_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], summary: str, spare: Sequence[Sequence[int]] = ()
) -> object:
    """Draw a table for rich's console, in the width that the console has when it prints.

    Args:
        header: Names of the columns.
        rows: The cells.
        summary: A sentence to close with.
        spare: As in `print_table`.

    Returns:
        An object that rich can print.
    """
    return _RichTable(_Table.of(header, rows, spare), printable(summary))


def first_to_last(names: Sequence[str]) -> str:
    """Name the layers that a row stands for.

    Args:
        names: Dotted names of the layers, `""` for the model itself.

    Returns:
        The name of a single layer; of several layers the first, the last and their number.

    Example:
        >>> first_to_last(["bn1"]), first_to_last(["bn1", "bn2", "bn3"])
        ('bn1', 'bn1 ... bn3 (3)')
    """
    first = names[0] or "(the model)"
    return first if len(names) == 1 else f"{first} ... {names[-1]} ({len(names)})"


@dataclass(frozen=True)
class _Table:
    """A table and how it is shown.

    Attributes:
        header: Names of the columns.
        rows: The cells, each on a single line.
        spare: Columns that may be left out, by position, in groups.
        notes: Lines below the table on columns that are not shown.
        prose: Characters per line of the last column; None leaves it unwrapped.
        is_stacked: Whether the cells of a row stand below each other.
    """

    header: list[str]
    rows: list[list[str]]
    spare: Sequence[Sequence[int]] = ()
    notes: list[str] = field(default_factory=list[str])
    prose: int | None = None
    is_stacked: bool = False

    @classmethod
    def of(cls, header: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[Sequence[int]]) -> _Table:
        return cls([*header], [[printable(cell) for cell in row] for row in rows], spare)

    def fitted(self, width: int, outside: int) -> _Table:
        """Return the table fitted to a width; three characters separate two columns.

        Args:
            width: The number of characters in a line.
            outside: The number of characters around all columns, beyond three for each column.
        """
        room = max(width, _LEAST_WIDTH) - outside
        if self._fits([*range(len(self.header))], room):
            return self
        varied, same = self._varied()
        shown, left_out = varied, list[int]()
        for group in self.spare:
            if self._fits(shown, room):
                break
            left_out += [column for column in group if column in shown]
            shown = [column for column in shown if column not in group]
        shared = [f"{self.header[c]} {self.rows[0][c]}" for c in same if self.rows[0][c] not in _NOTHING]
        notes = [f"In every row: {', '.join(shared)}"] if shared else []
        prose = None
        if not self._fits(shown, room):
            others = sum(self._width(column) + 3 for column in shown[:-1])
            prose = room - others - 3
            if prose < _LEAST_PROSE or shown[-1] != len(self.header) - 1:
                return self._of(varied, notes, is_stacked=True)
        if left_out:
            names = ", ".join(self.header[column] for column in sorted(left_out))
            notes.append(f"Not shown in {width} columns: {names}")
        return self._of(shown, notes, prose=prose)

    def lines(self, width: int | None) -> Iterator[str]:
        """Yield the lines of rows whose cells stand below each other: the first cell, then the others indented."""
        for first, *others in self.rows:
            yield from textwrap.wrap(first, max(width or 0, _LEAST_WIDTH), break_on_hyphens=False) or [""]
            pairs = [
                f"{name} {cell}" for name, cell in zip(self.header[1:], others, strict=True) if cell not in _NOTHING
            ]
            line = ""
            for pair in pairs:
                longer = f"{line} | {pair}" if line else pair
                if line and width is not None and _cells(longer) + 2 > width:
                    yield from _indented(line, width)
                    longer = pair
                line = longer
            yield from _indented(line, width)

    def _of(
        self, columns: Sequence[int], notes: list[str], prose: int | None = None, *, is_stacked: bool = False
    ) -> _Table:
        rows = [[row[column] for column in columns] for row in self.rows]
        return _Table([self.header[column] for column in columns], rows, (), notes, prose, is_stacked)

    def _varied(self) -> tuple[list[int], list[int]]:
        """Return the columns that tell rows apart, and the columns that are the same in all rows."""
        columns = range(len(self.header))
        alike = {c for c in columns if c and len(self.rows) > 1 and len({row[c] for row in self.rows}) == 1}
        return [c for c in columns if c not in alike], sorted(alike)

    def _fits(self, columns: Sequence[int], room: int) -> bool:
        return sum(self._width(column) + 3 for column in columns) <= room

    def _width(self, column: int) -> int:
        return max(_cells(row[column]) for row in [self.header, *self.rows])


@dataclass(frozen=True)
class _RichTable:
    """Draws a table in the width of rich's console."""

    table: _Table
    summary: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the table and the lines below it."""
        from rich.table import Table
        from rich.text import Text

        shown = self.table.fitted(options.max_width, outside=1)
        # A Text is not read as markup: a layer may be called bn[1], and a path [/x].pt.
        if shown.is_stacked:
            yield from (
                Text(line, style="" if line.startswith(" ") else "bold") for line in shown.lines(options.max_width)
            )
        else:
            drawn = Table()
            for column, name in enumerate(shown.header):
                is_prose = shown.prose is not None and column == len(shown.header) - 1
                width = shown.prose if is_prose else max(_cells(row[column]) for row in [shown.header, *shown.rows])
                drawn.add_column(Text(name), overflow="fold", width=width)
            for row in shown.rows:
                drawn.add_row(*map(Text, row))
            yield drawn
        yield from map(Text, shown.notes)
        yield Text(self.summary, style="italic")


def _aligned(rows: Sequence[Sequence[str]], prose: int | None) -> list[str]:
    """Return rows as lines with aligned columns; the last column is wrapped, or left at its length."""
    last = len(rows[0]) - 1
    widths = [max(_cells(row[column]) for row in rows) for column in range(last)]
    lines: list[str] = []
    for row in rows:
        parts = (textwrap.wrap(row[last], prose, break_on_hyphens=False) if prose else []) or [row[last]]
        lines.append(" | ".join([*map(_padded, row[:last], widths), parts[0]]))
        lines += [" | ".join([*(" " * width for width in widths), part]) for part in parts[1:]]
    return lines


def _indented(line: str, width: int | None) -> list[str]:
    if width is None or _cells(line) + 2 <= width:
        return [f"  {line}"] if line else []
    return [f"  {part}" for part in textwrap.wrap(line, max(width, _LEAST_WIDTH) - 2, break_on_hyphens=False)]


def _padded(cell: str, width: int) -> str:
    return cell + " " * (width - _cells(cell))


def _cells(text: str) -> int:
    """Return the width of a text on a terminal: letters of East Asia take two characters, combining accents none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
