"""Reads the file of an offline run of Weights & Biases, a damaged file up to its damage."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_revbn.runs.names import one_line
from lightning_revbn.runs.scalars import Advance, Columns, LogError, Scalars, Series

__all__ = ["WANDB_SUFFIX", "read_wandb", "read_wandb_settings"]

WANDB_SUFFIX = ".wandb"

_MARK = b":W&B"
_HEAD = 7  # bytes of the file's own header, and of the header before each piece of a record
_BLOCK = 32768
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_STEP = "trainer/global_step"
"""The key under which Lightning's WandbLogger logs the Trainer's step."""


def read_wandb(path: Path, advance: Advance) -> Scalars:
    """Read every scalar of a run.

    Args:
        path: The file, `run-ID.wandb`.
        advance: Called with the number of bytes after every read.

    Returns:
        The scalars in the order they were logged in, each at the steps that W&B draws it over: the steps of its
        `define_metric`, else the Trainer's, else W&B's own.

    Raises:
        LogError: If the file holds no value, or wandb is missing.
    """
    rows = _Rows()
    damage: list[str] = []
    for record in _until_damage(path, advance, damage):
        kind = record.WhichOneof("record_type")
        if kind == "metric":
            rows.axes.define(record.metric)
        elif kind == "history":
            rows.add(dict(_items(record.history.item)), record.history.step.num)
    series = rows.series()
    if not series:
        raise LogError(damage[0] if damage else f"{one_line(path)} holds no values")
    warnings = [f"{text}; what is before was read" for text in damage]
    left_out = rows.left_out
    if left_out:
        key = min(left_out)
        axis, count = left_out[key]
        more = f" (and of {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        what = f"{count} values of {one_line(key)}{more}"
        warnings.append(f"{one_line(path)}: left out {what} that stand at no step of {one_line(axis)}")
    return Scalars(series, frozenset(series), tuple(warnings), frozenset(series) & rows.on_other_axes)


class _Axes:
    """Tells by which scalar the steps of another are counted, as `wandb.define_metric` has set it."""

    def __init__(self) -> None:
        self._by_name: dict[str, str] = {}
        self._by_start: dict[str, str] = {}

    def define(self, metric: Any) -> None:
        """Take in a record of `define_metric`, whose name may end with `*`."""
        if metric.step_metric and metric.glob_name:
            self._by_start[metric.glob_name.removesuffix("*")] = metric.step_metric
        elif metric.step_metric:
            self._by_name[metric.name] = metric.step_metric

    def of(self, key: str) -> str:
        """Return the axis of a key: the Trainer's where nothing is said, or for all keys alike by Lightning."""
        if key in self._by_name:
            return self._by_name[key]
        starts = [start for start in self._by_start if key.startswith(start)]
        return self._by_start[max(starts, key=len)] if starts else _STEP


class _Rows:
    """Collects the values of a file at the steps of their axes, and at W&B's own for keys that have none there."""

    def __init__(self) -> None:
        self.axes = _Axes()
        self.left_out: dict[str, tuple[str, int]] = {}
        self.on_other_axes: set[str] = set()
        self._on_axes = Columns()
        self._on_own = Columns()

    def add(self, row: dict[str, Any], own_step: int) -> None:
        """Take in a row."""
        for key, value in row.items():
            number = _number(value)
            if number is None or key.startswith("_") or key == _STEP:
                continue
            self._on_own.add(key, own_step, number)
            axis = self.axes.of(key)
            step = _number(row.get(axis))
            if step is not None and step == step // 1:
                self._on_axes.add(key, int(step), number)
                if axis != _STEP:
                    self.on_other_axes.add(key)
            else:
                self.left_out[key] = axis, self.left_out.get(key, (axis, 0))[1] + 1

    def series(self) -> dict[str, Series]:
        """Return the series; `left_out` then tells of the values that belong to no step."""
        made, apart = self._on_axes.series(), set[str]()
        for key, own in self._on_own.series().items():
            # Past Lightning's logger W&B repeats the Trainer's last step: there it would draw such a key as one point.
            stands_still = key in made and key not in self.on_other_axes and len(made[key].steps) == 1 < len(own.steps)
            if key not in made or stands_still:
                made[key] = own
                apart.add(key)
        self.left_out = {key: told for key, told in self.left_out.items() if key not in apart}
        if not (self.on_other_axes | apart).issuperset(made):  # the Trainer's steps are there, and W&B's own are others
            self.on_other_axes |= apart
        return made


def read_wandb_settings(path: Path) -> dict[str, Any]:
    """Read the configuration of a run.

    Args:
        path: The file.

    Returns:
        The last values by key; nested values stay nested.

    Raises:
        LogError: If wandb is missing.
    """
    settings: dict[str, Any] = {}
    for record in _until_damage(path, lambda size: None, []):
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            settings.update(_items((record.run.config if kind == "run" else record.config).update))
    return settings


def _items(items: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the key and the value of a record's items; an unreadable value is None."""
    for item in items:
        try:
            value = json.loads(item.value_json)
        except (ValueError, RecursionError):
            value = None
        yield item.key or "/".join(item.nested_key), value


def _number(value: object) -> float | None:
    """Return a value as a number, or None; W&B may write NaN and infinity as names, which JSON lacks as numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _until_damage(path: Path, advance: Advance, damage: list[str]) -> Iterator[Any]:
    """Yield the records up to the damage of a file, and note the damage."""
    try:
        parse: Callable[[bytes], Any] = import_module("wandb.proto.wandb_internal_pb2").Record.FromString
    except ImportError as error:
        raise LogError(f"{one_line(path)} needs wandb to be read: pip install wandb") from error
    from google.protobuf.message import DecodeError

    data = path.read_bytes()
    if not data.startswith(_MARK):
        damage.append(f"{one_line(path)} is not a file of Weights & Biases, or is damaged from its beginning")
        return
    for end, content in _contents(data):
        if content is not None:
            try:
                yield parse(content)
                advance(len(content))
                continue
            except DecodeError:
                pass
        damage.append(f"{one_line(path)} is damaged or cut off at byte {end} of {len(data)}")
        return


def _contents(data: bytes) -> Iterator[tuple[int, bytes | None]]:
    """Yield the position and the content of each record; at damage, yield None as the content and stop.

    The file has LevelDB's log format (https://github.com/google/leveldb/blob/main/doc/log_format.md): blocks of 32 KiB,
    and records in pieces that never cross a block. wandb's Python code no longer has a reader for it.
    """
    position = start = _HEAD
    pending: list[bytes] = []
    while position < len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEAD:  # zeros fill the end of a block that has no room for a header
            position += left
            continue
        if position + _HEAD > len(data):
            break
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + _HEAD : position + _HEAD + length]
        follows = kind in (_MIDDLE, _LAST)
        is_whole = len(piece) == length and zlib.crc32(bytes([kind]) + piece) == checksum
        if not is_whole or kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or follows != bool(pending):
            yield start, None
            return
        pending.append(piece)
        position += _HEAD + length
        if kind in (_WHOLE, _LAST):
            yield start, b"".join(pending)
            pending, start = [], position
    if pending or position < len(data):
        yield start, None
