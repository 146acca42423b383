"""Reads the event files of Lightning's TensorBoardLogger, a damaged file up to its damage."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np

from lightning_revbn.runs.names import one_line
from lightning_revbn.runs.scalars import Advance, Columns, LogError, Scalars, Series

__all__ = ["first_steps", "read_events"]


def read_events(directory: Path, files: Sequence[Path], advance: Advance) -> Scalars:
    """Read every scalar of a run; a later file replaces earlier values of a key from its own first step on.

    Args:
        directory: The run's directory.
        files: The run's event files, oldest first.
        advance: Called with the number of bytes after every read.

    Returns:
        The scalars in the order they were logged in.

    Raises:
        LogError: If no file holds a value, or tensorboard is missing.
    """
    series: dict[str, Series] = {}
    warnings: list[str] = []
    for file in files:
        columns = Columns()
        for key, step, value in _until_damage(file, advance, warnings):
            columns.add(key, step, value)
        for key, later in columns.series().items():
            series[key] = _resumed(series[key], later) if key in series else later
    if not series:
        raise LogError(warnings[0] if warnings else f"{one_line(directory)} holds no values")
    return Scalars(series, frozenset(series), tuple(f"{warning}; what is before was read" for warning in warnings))


def first_steps(files: Iterable[Path], keys: Collection[str], advance: Advance) -> dict[str, int]:
    """Find the first step of each key, and stop reading when every key is found.

    Args:
        files: The event files of a run, oldest first.
        keys: The keys.
        advance: Called with the number of bytes after every read.

    Returns:
        The steps by key, in the order the keys were logged in; keys that the files do not hold are missing.
    """
    first: dict[str, int] = {}
    for file in files:
        for key, step, _ in _until_damage(file, advance, damage=[]):  # only the order matters here
            if key in keys and key not in first:
                first[key] = step
                if len(first) == len(keys):
                    return first
    return first


class _DamagedError(Exception):
    """An event file ends or breaks in the middle of a record."""


def _resumed(before: Series, after: Series) -> Series:
    kept = before.steps < after.steps[0]
    return Series(
        np.concatenate([before.steps[kept], after.steps]), np.concatenate([before.values[kept], after.values])
    )


def _until_damage(path: Path, advance: Advance, damage: list[str]) -> Iterator[tuple[str, int, float]]:
    """Yield the scalars of an event file up to its damage, and note the damage."""
    try:
        yield from _events(path, advance)
    except _DamagedError as error:
        damage.append(str(error))


def _events(path: Path, advance: Advance) -> Iterator[tuple[str, int, float]]:
    """Yield key, step and value of every scalar in an event file."""
    # tensorboard's EventAccumulator computes the checksum of every record in Python, which takes fifteen times as
    # long, and it silently stops at damage. TensorBoard's own server, and this code, check only the checksum of each
    # length, and parse each record.
    try:
        parse: Callable[[bytes], Any] = import_module("tensorboard.compat.proto.event_pb2").Event.FromString
    except ImportError as error:
        raise LogError(
            f'{one_line(path)} needs tensorboard to be read: pip install "lightning-revbn[plots]"'
        ) from error
    from google.protobuf.message import DecodeError

    if not path.stat().st_size:
        raise _DamagedError(f"{one_line(path)} is empty")
    with path.open("rb") as file:
        for start, record in _records(file, path, advance):
            try:
                event = parse(record)
            except DecodeError as error:
                raise _DamagedError(_damage(path, start)) from error
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    yield value.tag, event.step, value.simple_value


def _records(file: IO[bytes], path: Path, advance: Advance) -> Iterator[tuple[int, bytes]]:
    """Yield the position and the content of each record."""
    # A record holds the length of its content (8 bytes), the checksum of the length (4), the content, and the
    # checksum of the content (4).
    start, end = 0, path.stat().st_size  # the end is fixed here, as a run may still write to the file
    while start < end:
        head = file.read(12)
        length = _length(head)
        if length is None or start + length + 16 > end:
            raise _DamagedError(_damage(path, start))
        yield start, file.read(length)
        file.read(4)
        start += length + 16
        advance(length + 16)


@functools.lru_cache(maxsize=4096)  # lengths repeat, and tensorboard's checksum is slow Python
def _length(head: bytes) -> int | None:
    """Return the length of a record; None if the checksum does not match."""
    checksum = import_module("tensorboard.compat.tensorflow_stub.pywrap_tensorflow").masked_crc32c
    if len(head) < 12 or struct.pack("<I", checksum(head[:8])) != head[8:]:
        return None
    return int.from_bytes(head[:8], "little")


def _damage(path: Path, start: int) -> str:
    if not start:
        return f"{one_line(path)} is not an event file of TensorBoard, or is damaged from its beginning"
    return f"{one_line(path)} is damaged or cut off at byte {start} of {path.stat().st_size}"
