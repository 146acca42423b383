"""What commands show at a terminal beside their results: a progress bar, and messages on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

from lightning_revbn.core.table import use_rich
from lightning_revbn.runs.scalars import Advance

__all__ = ["CommandError", "progress_bar", "tell"]


class CommandError(Exception):
    """A command that cannot do what was asked; the message is one line and says why."""


def tell(message: object) -> None:
    """Print a message to stderr, under the name of the command.

    Args:
        message: One line.
    """
    print(f"lightning-revbn: {message}", file=sys.stderr)  # noqa: T201


@contextmanager
def progress_bar(task: str, total: int, wait: float = 1.0) -> Generator[Advance, None, None]:
    """Show a bar on stderr if stderr is a terminal and rich is installed, and leave nothing behind.

    Args:
        task: What is done.
        total: The length of it.
        wait: Seconds until the bar shows, since nobody needs to see a bar for work that is over at once.

    Yields:
        Call it with what was done since the last call.
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
