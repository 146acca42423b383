"""Writes the output of commands: results to stdout as text or JSON, messages and a bar to stderr, no traceback."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

from lightning_revbn.core.printable import printable, shortened
from lightning_revbn.core.table import print_table, use_rich
from lightning_revbn.runs.scalars import Advance

__all__ = [
    "CommandError",
    "OutputClosedError",
    "any_encoding",
    "print_json",
    "progress_bar",
    "say",
    "show_table",
    "tell",
    "writing",
]

_LONGEST_MESSAGE = 2000


class CommandError(Exception):
    """A command cannot do its work; the message gives the reason in a single line."""


class OutputClosedError(Exception):
    """The reader of stdout has closed it, as `head` does after its lines."""


def tell(message: object) -> None:
    """Print a message to stderr, under the name of the command.

    Args:
        message: The message; characters that cannot be printed are escaped.
    """
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison] # a process may have no stderr
        return
    try:
        print(f"lightning-revbn: {shortened(message, _LONGEST_MESSAGE)}", file=sys.stderr, flush=True)  # noqa: T201
    except OSError:  # stderr is closed, so the failure cannot be reported
        _discard(sys.stderr)


def say(line: str) -> None:
    """Print a line to stdout.

    Args:
        line: The line; characters that cannot be printed are escaped.
    """
    with writing():
        print(printable(line))  # noqa: T201


def show_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], summary: str, spare: Sequence[Sequence[int]] = ()
) -> None:
    """Print a table to stdout, as `lightning_revbn.core.table.print_table` does.

    Args:
        header: Names of the columns.
        rows: The cells.
        summary: A sentence below the table.
        spare: Groups of columns that a narrow terminal leaves out.
    """
    with writing():
        print_table(header, rows, summary, spare)


def print_json(value: Any) -> None:
    """Print a value to stdout as strict JSON, which every reader accepts: NaN and infinity become null.

    Args:
        value: A value of dicts, lists, tuples, texts, numbers, booleans and None.
    """
    with writing():
        print(json.dumps(_strict(value), indent=2, allow_nan=False))  # noqa: T201


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):  # a path may hold bytes that Python reads as lone surrogates
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_strict(key): _strict(item) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in cast("Sequence[Any]", value)]
    return value


@contextmanager
def writing() -> Generator[None, None, None]:
    """Write to stdout in a `with` block, and flush stdout at its end.

    Yields:
        Nothing.

    Raises:
        OutputClosedError: If the reader of stdout has closed it.
        CommandError: If stdout cannot be written, for example on a full disk.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison] # a process may have no stdout
                sys.stdout.flush()
    except BrokenPipeError as error:
        _discard(sys.stdout)
        raise OutputClosedError from error
    except OSError as error:
        _discard(sys.stdout)
        raise CommandError(f"standard output cannot be written: {error.strerror or error}") from error


def _discard(stream: Any) -> None:
    """Send a stream's remaining output to the null device; otherwise Python would write it again at exit, and fail."""
    with suppress(OSError):  # a test's stream has no file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextmanager
def any_encoding() -> Generator[None, None, None]:
    """Let stdout and stderr take every text in a `with` block: characters that their encoding lacks are escaped.

    Yields:
        Nothing.
    """
    streams: list[Any] = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


@contextmanager
def progress_bar(task: str, total: int, wait: float = 1.0) -> Generator[Advance, None, None]:
    """Show a bar on stderr if stderr is a terminal and rich is installed, and remove it at the end.

    Args:
        task: The name of the work.
        total: The size of the work, such as a number of bytes.
        wait: Seconds until the bar shows: short work needs no bar.

    Yields:
        A function to call with the amount of work done since its last call.
    """
    if not use_rich(sys.stderr):
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
