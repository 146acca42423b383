"""Entry point of the command `lightning-revbn`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_revbn.cli import inspect
from lightning_revbn.cli.targets import TargetError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line; None takes the process's own.

    Returns:
        The exit code: 0 if it did what was asked, 1 if the target could not be read. Wrong usage exits with 2.
    """
    parser = argparse.ArgumentParser(prog="lightning-revbn", description="Revisited batch norm initialisation.")
    inspect.add_parser(parser.add_subparsers(required=True, metavar="COMMAND"))
    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed)
    except TargetError as error:
        print(f"lightning-revbn: {error}", file=sys.stderr)  # noqa: T201
        return 1


if __name__ == "__main__":
    sys.exit(main())
