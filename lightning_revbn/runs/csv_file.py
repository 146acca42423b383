"""Reads `metrics.csv`, the file of Lightning's CSVLogger."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

from lightning_revbn.runs.names import natural, one_line
from lightning_revbn.runs.scalars import MAX_STEP, Advance, Columns, LogError, Scalars

__all__ = ["CSV_NAME", "read_csv"]

CSV_NAME = "metrics.csv"


def read_csv(path: Path, advance: Advance) -> Scalars:
    """Read every scalar of a file.

    Args:
        path: The file.
        advance: Called with the number of bytes after every read.

    Returns:
        The scalars, sorted by name: CSVLogger sorts its columns.

    Raises:
        LogError: If CSVLogger did not write the file, or the file holds no values.
    """
    if not path.stat().st_size:
        raise LogError(f"{one_line(path)} is empty")
    warnings: list[str] = []
    columns = Columns()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(_complete_lines(file, warnings, advance))
            header = next(rows, cast("list[str]", []))
            if "step" not in header:
                shown = ", ".join(one_line(name, 30) for name in header[:5])
                raise LogError(f"{one_line(path)} is not a {CSV_NAME} of CSVLogger: it has no column step, but {shown}")
            skipped = _collect(rows, header, columns)
    except UnicodeDecodeError as error:
        raise LogError(f"{one_line(path)} is not a {CSV_NAME} of CSVLogger: it is not text") from error
    except csv.Error as error:
        raise LogError(f"{one_line(path)} is not a {CSV_NAME} of CSVLogger: {one_line(error)}") from error
    if skipped:
        warnings.append(f"rows without a step were left out: {skipped}")
    series = columns.series()
    if not series:
        raise LogError(f"{one_line(path)} holds no values")
    ordered = {key: series[key] for key in sorted(series, key=natural)}
    return Scalars(ordered, warnings=tuple(f"{one_line(path)}: {warning}" for warning in warnings))


def _complete_lines(file: Iterable[str], warnings: list[str], advance: Advance) -> Iterator[str]:
    for line in file:
        advance(len(line))
        if not line.endswith(("\n", "\r")):  # the last number of a cut line may lack digits, or its exponent
            warnings.append("ends in the middle of a line, which was left out")
            return
        yield line


def _collect(rows: Iterable[list[str]], header: Sequence[str], columns: Columns) -> int:
    """Add the cells of all rows; return the number of rows with values but no step."""
    at = header.index("step")
    skipped = 0
    for row in rows:
        step = _number(row[at]) if at < len(row) else None
        if step is None or not abs(step) <= MAX_STEP:  # true for NaN too
            skipped += any(row)
            continue
        for key, cell in zip(header, row, strict=False):
            if cell and key != "step":
                value = _number(cell)
                if value is not None:
                    columns.add(key, int(step), value)
    return skipped


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
