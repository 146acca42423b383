"""Entry point of the command `lightning-revbn`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_revbn.cli import compare, inspect, plot
from lightning_revbn.cli.terminal import CommandError, tell
from lightning_revbn.runs.scalars import LogError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line; None takes the process's own.

    Returns:
        The exit code: 0 if it did what was asked, 1 if the target or the logs could not be read, the
        runs not be compared or the figure not be drawn. Wrong usage exits with 2.
    """
    parser = argparse.ArgumentParser(prog="lightning-revbn", description="Revisited batch norm initialisation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect.add_parser(commands)
    plot.add_parser(commands)
    compare.add_parser(commands)
    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (CommandError, LogError) as error:
        tell(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
