"""Finds the seed among the overrides of a Hydra job, which Hydra writes into the job's directory."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from lightning_revbn.runs.names import one_line
from lightning_revbn.runs.scalars import LogError

__all__ = ["overridden_seeds"]

_FILE = Path(".hydra", "overrides.yaml")
_MOST_BYTES = 1_000_000
_FARTHEST = 4
"""Directories between a log and its job, at most: loggers add a name, a version, and their own directories."""
_OVERRIDE = re.compile(r"""- ['"]?\+{0,2}(\w+)=([0-9]+)['"]?""")


def overridden_seeds(path: Path, names: Collection[str]) -> set[str]:
    """Read the seeds that the command line of a Hydra job has set.

    Args:
        path: The path of a run's log. Its own directory or one of the next directories above is the job's.
        names: The names that a seed has. Nested seeds such as `data.seed=0` do not count: they may be a part's own.

    Returns:
        The digits of every seed; empty if no directory is a job's.

    Raises:
        LogError: If the job's file of overrides cannot be read.
    """
    absolute = path.absolute()
    for directory in [absolute, *absolute.parents][: _FARTHEST + 1]:
        file = directory / _FILE
        if file.is_file():
            return _seeds(file, names)
    return set()


def _seeds(file: Path, names: Collection[str]) -> set[str]:
    try:
        with file.open(encoding="utf-8", errors="replace") as content:
            lines = content.read(_MOST_BYTES).splitlines()
    except OSError as error:
        raise LogError(f"{one_line(file)} cannot be read: {error.strerror or error}") from error
    found = [match.groups() for match in map(_OVERRIDE.fullmatch, lines) if match is not None]
    return {digits for name, digits in found if name in names}
