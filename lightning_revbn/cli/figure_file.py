"""Checks the file of a figure before a command's work, and writes it afterwards; imports matplotlib only to write."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_revbn.cli.terminal import CommandError
from lightning_revbn.runs.names import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PlotError", "check_output", "matplotlib_needed", "save_figure"]

_SUFFIXES = (".png", ".svg", ".pdf")


class PlotError(CommandError):
    """A figure cannot be drawn as asked."""


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before the work begins.

    Args:
        path: The path of the figure.

    Raises:
        PlotError: If the suffix is unknown, the directory does not exist, or the path is a directory.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise PlotError(f"{one_line(path)} must end in any of {', '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise PlotError(f"{one_line(path)} cannot be written: the directory {one_line(path.parent)} does not exist")
    if path.is_dir():
        raise PlotError(f"{one_line(path)} cannot be written: it is a directory")


@contextmanager
def matplotlib_needed() -> Generator[None, None, None]:
    """Say how to install matplotlib if an import of `lightning_revbn.plots` fails.

    Yields:
        Nothing; import inside the block.

    Raises:
        PlotError: If the import fails.
    """
    try:
        yield
    except ImportError as error:
        raise PlotError('figures need matplotlib: pip install "lightning-revbn[plots]"') from error


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure.

    Args:
        figure: The figure.
        path: A file that `check_output` accepts.

    Raises:
        PlotError: If the file cannot be written.
    """
    from lightning_revbn.plots import output

    try:
        output.save(figure, path)
    except OSError as error:
        raise PlotError(f"{one_line(path)} cannot be written: {error.strerror or error}") from error
