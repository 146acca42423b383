"""The option `--seed-pattern`: a regular expression, which may be wrong, or take more time than there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_revbn.cli.terminal import CommandError
from lightning_revbn.runs.names import one_line

__all__ = ["SeedPatternError", "check_time", "parse_seed_pattern"]

_LONGEST = 10.0
"""Seconds for all paths, and for a Python to start on a busy machine."""
_SEARCH = "import json, re, sys; p, paths = json.load(sys.stdin); p = re.compile(p); [p.search(path) for path in paths]"


class SeedPatternError(CommandError):
    """A pattern that cannot find seeds; the message is one line and says why."""


def parse_seed_pattern(text: str) -> re.Pattern[str]:
    """Read the option.

    Args:
        text: What the user wrote.

    Returns:
        The regular expression.

    Raises:
        SeedPatternError: If it is none, or has no group.
    """
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:  # a huge number of repetitions; thousands of brackets
        raise SeedPatternError(f"--seed-pattern {one_line(text)} is not a regular expression: {error}") from error
    if pattern.groups < 1:
        raise SeedPatternError(f"--seed-pattern {one_line(text)} must have a group, such as 'run_(\\d+)'")
    return pattern


def check_time(pattern: re.Pattern[str], paths: Sequence[Path], longest: float = _LONGEST) -> None:
    """Refuse a pattern that does not come to an end: `(a+)+$` doubles its time with every letter of a path.

    The paths are searched in another process first. Nothing else stops a search on every system: it runs in C, and lets
    no other thread run.

    Args:
        pattern: The regular expression.
        paths: The paths that it is to find seeds in.
        longest: Seconds that it may take.

    Raises:
        SeedPatternError: If it takes longer.
    """
    job = json.dumps([pattern.pattern, [*map(str, paths)]])
    try:
        subprocess.run([sys.executable, "-I", "-S", "-c", _SEARCH], input=job, text=True, timeout=longest, check=True)
    except subprocess.TimeoutExpired as error:
        raise SeedPatternError(
            f"--seed-pattern {one_line(pattern.pattern)} takes more than {longest:g} seconds for {len(paths)} paths: "
            "write it without a repetition inside a repetition, as in (a+)+"
        ) from error
