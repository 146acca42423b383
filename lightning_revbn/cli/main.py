"""Entry point of the command `lightning-revbn`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from typing_extensions import override

from lightning_revbn import __version__
from lightning_revbn.cli import compare, inspect, plot
from lightning_revbn.cli.completion import PrintCompletion
from lightning_revbn.cli.terminal import CommandError, OutputClosedError, any_encoding, tell, writing
from lightning_revbn.core.printable import shortened
from lightning_revbn.runs.scalars import LogError

__all__ = ["main"]

_OUTPUT_CLOSED = 141
"""The exit code of a program whose output nobody reads any more, as shells report it: 128 + SIGPIPE."""
_INTERRUPTED = 130  # 128 + SIGINT


class _Parser(argparse.ArgumentParser):
    """A parser whose errors quote the command line as text."""

    @override
    def error(self, message: str) -> NoReturn:
        super().error(shortened(message, 1000))

    @override
    def _print_message(self, message: str, file: Any = None) -> None:
        if file is None or file is not sys.stdout:
            super()._print_message(message, file)
        else:
            file.write(message)  # argparse would ignore a failure to write


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line; None takes the command line of the process.

    Returns:
        The exit code: 0 on success. 1 if the target or logs cannot be read, the runs cannot be compared, or the figure
        or result cannot be written. 130 after an interrupt, 141 if nobody reads the output any more. Wrong usage exits
        with 2.
    """
    with any_encoding():
        try:
            with writing():  # parsing may print help, version and completion
                parsed = _parser().parse_args(arguments)
            return parsed.run(parsed)
        except (CommandError, LogError) as error:
            tell(error)
            return 1
        except OutputClosedError:
            return _OUTPUT_CLOSED
        except KeyboardInterrupt:
            return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lightning-revbn", description="Revisited batch norm initialisation.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script that completes this command in a shell, and exit",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect.add_parser(commands)
    plot.add_parser(commands)
    compare.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
