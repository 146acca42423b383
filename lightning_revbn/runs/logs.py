"""Reads what Lightning's CSVLogger and TensorBoardLogger wrote: every scalar of a run, or its batch norm layers."""

from __future__ import annotations

import csv
import functools
import itertools
import os
import re
import struct
import time
from array import array
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from lightning_revbn.core.metric_keys import DEFAULT_PREFIX, LAYER_QUANTITIES, WHOLE_MODEL_QUANTITIES, first_part

CSV_NAME = "metrics.csv"
EVENTS_MARK = "tfevents"  # what TensorBoard knows event files by: it is in all their names
MAX_STEP = 2**53  # no run is longer, and up to here steps are exact on a figure's axis too

Advance: TypeAlias = Callable[[int], object]


class LogError(Exception):
    """Logs that cannot be read; the message is one line and says why."""


@dataclass(frozen=True)
class Log:
    """The files of one run.

    Args:
        path: The run's directory; or the file, if a CSV file was named that is not called metrics.csv.
        csv: The file of its CSVLogger.
        events: The files of its TensorBoardLogger, the oldest first: a resumed run begins another.
        named: Whether the user named it, rather than a directory above.
    """

    path: Path
    csv: Path | None = None
    events: tuple[Path, ...] = ()
    named: bool = True

    @property
    def size(self) -> int:
        """How many bytes there are to read, at most."""
        return sum(file.stat().st_size for file in (self.csv, *self.events) if file is not None)


@dataclass(frozen=True, eq=False)
class Series:
    """One scalar over training.

    Args:
        steps: Ascending, each once, shape `(N,)`.
        values: As they were logged, NaN and infinity too, shape `(N,)`.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scalars:
    """All scalars of a run.

    Args:
        series: By key; in the order they were logged in as far as that is known, then by name.
        in_order: The keys whose order is known. A metrics.csv does not tell: its columns are sorted.
        warnings: What is missing or was left out, a line each.
    """

    series: Mapping[str, Series]
    in_order: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Run:
    """What BatchNormMonitor logged in a run.

    Args:
        label: What the run is called.
        layers: Names of the layers from input to output; `("",)` for a model that is one batch norm layer itself,
            and for a run that logged the whole model only.
        series: By layer and quantity (`"scale_mean"`).
        by_depth: Whether the order of layers is known; otherwise they are sorted by name.
        whole_model: Whether single layers were not logged.
    """

    label: str
    layers: tuple[str, ...]
    series: Mapping[tuple[str, str], Series]
    by_depth: bool = True
    whole_model: bool = False


def find_logs(paths: Iterable[Path]) -> list[Log]:
    """Find the runs that paths name.

    Args:
        paths: Each a metrics.csv, an event file, the directory of a run, or a directory above several. What is below
            the directory of a run belongs to it.

    Returns:
        The runs in the order of the paths, each once; those below one directory in natural order (2 before 10).

    Raises:
        LogError: If a path does not exist or holds no log.
    """
    found: dict[Path, Log] = {}
    for path in paths:
        try:
            logs = list(_logs_of(path))
        except OSError as error:
            raise LogError(f"{one_line(path)} cannot be read: {error.strerror}") from error
        if not logs:
            raise LogError(
                f"{one_line(path)} holds no log, nor does a directory below: neither {CSV_NAME} of CSVLogger nor an "
                "event file of TensorBoardLogger"
            )
        for log in logs:
            key = log.path.resolve()
            found[key] = _joined_log(found[key], log) if key in found else log
    return list(found.values())


def read_scalars(log: Log, advance: Advance = lambda size: None) -> Scalars:
    """Read every scalar that was logged in a run.

    Where a run has both kinds of files, values are those of metrics.csv and the order is that of the event files. If
    the event files begin earlier, the values are theirs too: CSVLogger deletes its file when a run is resumed.

    Args:
        log: The run.
        advance: Called with the number of bytes whenever some were read.

    Returns:
        The scalars. If a step was logged twice, the last one counts.

    Raises:
        LogError: If nothing can be read.
    """
    try:
        if log.csv is None:
            return _read_events(log, advance)
        if not log.events:
            return _read_csv(log.csv, advance)
        return _read_both(log, log.csv, advance)
    except OSError as error:
        raise LogError(f"{one_line(error.filename or log.path)} cannot be read: {error.strerror or error}") from error


def batch_norm_run(label: str, scalars: Scalars, prefix: str | None = None) -> Run:
    """Pick what BatchNormMonitor logged.

    Args:
        label: What to call the run.
        scalars: All scalars of the run.
        prefix: The monitor's; None looks for it.

    Returns:
        The run.

    Raises:
        LogError: If there is nothing of BatchNormMonitor, or the prefix is ambiguous.
    """
    prefix = find_prefix(scalars.series) if prefix is None else prefix
    first = first_part(prefix)
    heads: dict[tuple[str, str], str] = {}
    for key in scalars.series:
        if key.startswith(first):
            layer, _, quantity = key[len(first) :].rpartition("/")
            if quantity in LAYER_QUANTITIES:
                heads[layer, quantity] = key
    if not heads:
        keys = [one_line(key) for key in scalars.series]
        there = f"{', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
        raise LogError(
            f"the log of {one_line(label)} has no keys {one_line(first)}... of batch norm layers (it has {there}): add "
            "BatchNormMonitor() to the Trainer's callbacks"
        )
    layers = _layers(heads)
    known = frozenset(layers)
    series = {head: scalars.series[key] for head, key in heads.items() if head[0] in known}
    by_depth = all(heads[head] in scalars.in_order for head in series)
    whole_model = layers == [""] and all(quantity in WHOLE_MODEL_QUANTITIES for _, quantity in series)
    return Run(label, tuple(layers if by_depth else sorted(layers, key=natural)), series, by_depth, whole_model)


def find_prefix(keys: Iterable[str]) -> str:
    """Find the prefix of BatchNormMonitor.

    Args:
        keys: All keys of a run.

    Returns:
        `"revbn"` if the keys do not tell.

    Raises:
        LogError: If several monitors logged, and none under `revbn`.

    Example:
        >>> find_prefix(["train_loss", "bn/affine/scale_mean", "bn/affine/layer1.bn/scale_mean"])
        'bn/affine'
    """
    heads = {head for head, _, quantity in (key.rpartition("/") for key in keys) if quantity in LAYER_QUANTITIES}
    tops = sorted(head for head in heads if not any(_is_above(other, head) for other in heads))
    if DEFAULT_PREFIX in tops or not tops:
        return DEFAULT_PREFIX
    if len(tops) == 1:
        return tops[0]
    common = shared_parts([top.split("/") for top in tops])  # without the keys of the model, layers are at the top
    if not common:
        raise LogError(f"keys of BatchNormMonitor under {', '.join(map(one_line, tops[:5]))}: choose by --prefix")
    return "/".join(common)


def shared_parts(names: Sequence[Sequence[str]]) -> list[str]:
    """Return the leading parts that all names share.

    Args:
        names: Names in parts.

    Returns:
        The parts.

    Example:
        >>> shared_parts([["layer1", "0", "bn1"], ["layer1", "10", "bn1"]])
        ['layer1']
    """
    return [parts[0] for parts in itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*names, strict=False))]


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
    # A number is compared by its length first, which no limit on the digits of an int can stop.
    return tuple((len(part.lstrip("0")), part.lstrip("0")) if i % 2 else (0, part) for i, part in enumerate(parts))


def one_line(text: object, limit: int = 400) -> str:
    """Return a text from outside such that it fits into an error's one line.

    Args:
        text: A path, or a key out of a file.
        limit: Characters at most; what is longer loses its middle.

    Returns:
        The text without characters that do not print.
    """
    line = "".join(char if char.isprintable() else "?" for char in str(text))
    return line if len(line) <= limit else f"{line[: limit // 2 - 1]}...{line[2 - limit // 2 :]}"


@contextmanager
def progress_bar(task: str, total: int, wait: float = 1.0) -> Generator[Advance, None, None]:
    """Show a bar on stderr if that is a terminal and rich is installed, and leave nothing behind.

    Args:
        task: What is done.
        total: The length of it.
        wait: Seconds until it shows, since nobody needs to see what is over at once.

    Yields:
        Call it with what was done since the last call.
    """
    import sys

    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import Progress

    begun = time.monotonic()
    bar = Progress(console=Console(stderr=True), transient=True)
    identity = bar.add_task(task, total=total)

    def advance(size: int) -> None:
        if not bar.live.is_started and time.monotonic() - begun >= wait:
            bar.start()
        bar.advance(identity, size)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


class _DamagedError(Exception):
    """An event file ends or breaks in the middle of a record."""


class _Columns:
    """Collects points by key, and makes series of them."""

    def __init__(self) -> None:
        self._points: dict[str, tuple[array[int], array[float]]] = {}

    def add(self, key: str, step: int, value: float) -> None:
        if abs(step) > MAX_STEP:
            return
        if key not in self._points:
            self._points[key] = array("q"), array("d")
        steps, values = self._points[key]
        steps.append(step)
        values.append(value)

    def series(self) -> dict[str, Series]:
        made: dict[str, Series] = {}
        for key, (steps, values) in self._points.items():
            all_steps = np.array(steps, dtype=np.int64)
            unique, from_end = np.unique(all_steps[::-1], return_index=True)
            made[key] = Series(unique, np.array(values, dtype=np.float64)[len(values) - 1 - from_end])
        return made


def _logs_of(path: Path) -> Iterator[Log]:
    if path.is_file():
        yield _named_file(path)
    elif path.is_dir():
        for directory, below, files in os.walk(path):
            log = _in_directory(Path(directory), files, named=Path(directory) == path)
            below[:] = [] if log else sorted(below, key=natural)
            if log:
                yield log
    else:
        raise LogError(f"{one_line(path)} does not exist")


def _named_file(path: Path) -> Log:
    if EVENTS_MARK in path.name:
        return Log(path.parent, events=(path,))
    if path.name != CSV_NAME:
        return Log(path, csv=path)
    beside = _in_directory(path.parent, [file.name for file in path.parent.iterdir()], named=True)
    return beside or Log(path.parent, csv=path)


def _in_directory(directory: Path, names: Collection[str], named: bool) -> Log | None:
    events = sorted((name for name in names if EVENTS_MARK in name), key=natural)
    files = [directory / name for name in events if (directory / name).is_file()]
    table = directory / CSV_NAME if CSV_NAME in names and (directory / CSV_NAME).is_file() else None
    # A process that logged nothing, or was killed, leaves empty files behind.
    filled = [file for file in files if file.stat().st_size] or ([] if table else files[:1])
    return Log(directory, table, tuple(filled), named) if table or filled else None


def _joined_log(one: Log, other: Log) -> Log:
    events = {file.resolve(): file for file in (*other.events, *one.events)}
    ordered = sorted(events.values(), key=lambda file: natural(file.name))
    return Log(one.path, one.csv or other.csv, tuple(ordered), one.named or other.named)


def _is_above(one: str, other: str) -> bool:
    return one != other and (not one or other.startswith(f"{one}/"))


def _layers(heads: Collection[tuple[str, str]]) -> list[str]:
    """Return the layers in the order of the quantity that most of them have: some have no scale, for example."""
    by_quantity: dict[str, list[str]] = {}
    for layer, quantity in heads:
        if layer:
            by_quantity.setdefault(quantity, []).append(layer)
    longest_first = sorted(by_quantity.values(), key=len, reverse=True)
    return list(dict.fromkeys(layer for layers in longest_first for layer in layers)) or [""]


def _read_both(log: Log, table: Path, advance: Advance) -> Scalars:
    try:
        scalars = _read_csv(table, advance)
    except LogError as error:
        other = _read_events(log, advance)
        return Scalars(other.series, other.in_order, (f"{error}; read the event files instead", *other.warnings))
    if find_spec("tensorboard") is None:
        return scalars
    first_steps = _first_steps(log.events, scalars.series, advance)
    if any(step < scalars.series[key].steps[0] for key, step in first_steps.items()):
        return _read_events(log, advance)
    order = [*first_steps, *(key for key in scalars.series if key not in first_steps)]
    return Scalars({key: scalars.series[key] for key in order}, frozenset(first_steps), scalars.warnings)


def _read_csv(path: Path, advance: Advance) -> Scalars:
    if not path.stat().st_size:
        raise LogError(f"{one_line(path)} is empty")
    warnings: list[str] = []
    columns = _Columns()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(_complete_lines(file, warnings, advance))
            header = next(rows, cast("list[str]", []))
            if "step" not in header:
                shown = ", ".join(one_line(name, 30) for name in header[:5])
                raise LogError(f"{one_line(path)} is no {CSV_NAME} of CSVLogger: it has no column step, but {shown}")
            skipped = _collect(rows, header, columns)
    except UnicodeDecodeError as error:
        raise LogError(f"{one_line(path)} is no {CSV_NAME} of CSVLogger: it is not text") from error
    except csv.Error as error:
        raise LogError(f"{one_line(path)} is no {CSV_NAME} of CSVLogger: {one_line(error)}") from error
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
        if not line.endswith(("\n", "\r")):  # its last number may have lost digits, or its exponent
            warnings.append("ends in the middle of a line, which was left out")
            return
        yield line


def _collect(rows: Iterable[list[str]], header: Sequence[str], columns: _Columns) -> int:
    """Add the cells of all rows; return how many rows had values but no step."""
    at = header.index("step")
    skipped = 0
    for row in rows:
        step = _number(row[at]) if at < len(row) else None
        if step is None or not abs(step) <= MAX_STEP:
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


def _read_events(log: Log, advance: Advance) -> Scalars:
    """Read the event files; from the step on where a later file begins, its values replace the earlier ones'."""
    series: dict[str, Series] = {}
    warnings: list[str] = []
    for file in log.events:
        columns = _Columns()
        for key, step, value in _until_damage(file, advance, warnings):
            columns.add(key, step, value)
        for key, later in columns.series().items():
            series[key] = _resumed(series[key], later) if key in series else later
    if not series:
        raise LogError(warnings[0] if warnings else f"{one_line(log.path)} holds no values")
    return Scalars(series, frozenset(series), tuple(f"{warning}; what is before was read" for warning in warnings))


def _resumed(before: Series, after: Series) -> Series:
    kept = before.steps < after.steps[0]
    return Series(
        np.concatenate([before.steps[kept], after.steps]), np.concatenate([before.values[kept], after.values])
    )


def _first_steps(files: Iterable[Path], keys: Collection[str], advance: Advance) -> dict[str, int]:
    """Return the step where each key begins, in the order of the keys; read no further than needed."""
    first: dict[str, int] = {}
    for file in files:
        for key, step, _ in _until_damage(file, advance, damage=[]):  # the order is known as far as it can be read
            if key in keys and key not in first:
                first[key] = step
                if len(first) == len(keys):
                    return first
    return first


def _until_damage(path: Path, advance: Advance, damage: list[str]) -> Iterator[tuple[str, int, float]]:
    """Yield what can be read of an event file, and note what cannot."""
    try:
        yield from _events(path, advance)
    except _DamagedError as error:
        damage.append(str(error))


def _events(path: Path, advance: Advance) -> Iterator[tuple[str, int, float]]:
    """Yield key, step and value of every scalar in an event file."""
    # tensorboard's EventAccumulator computes the checksum of every record in Python, which takes fifteen times as long,
    # and stops at damage without saying so. Here, as in TensorBoard's own server, lengths have to have the right
    # checksum, and records to make sense.
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
    """Yield where each record starts, and its content."""
    # A record is the length of its content and the checksum of that (8 and 4 bytes), the content, and its checksum (4).
    start, end = 0, path.stat().st_size  # a run may go on writing meanwhile
    while start < end:
        head = file.read(12)
        length = _length(head)
        if length is None or start + length + 16 > end:
            raise _DamagedError(_damage(path, start))
        yield start, file.read(length)
        file.read(4)
        start += length + 16
        advance(length + 16)


@functools.lru_cache(maxsize=4096)  # few lengths are different
def _length(head: bytes) -> int | None:
    """Return the length of a record; None if its checksum is another."""
    checksum = import_module("tensorboard.compat.tensorflow_stub.pywrap_tensorflow").masked_crc32c
    if len(head) < 12 or struct.pack("<I", checksum(head[:8])) != head[8:]:
        return None
    return int.from_bytes(head[:8], "little")


def _damage(path: Path, start: int) -> str:
    if not start:
        return f"{one_line(path)} is no event file of TensorBoard, or is damaged from its beginning"
    return f"{one_line(path)} is damaged or cut off at byte {start} of {path.stat().st_size}"
