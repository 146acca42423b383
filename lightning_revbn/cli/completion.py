"""`lightning-revbn --print-completion SHELL`: a script of shtab, with which a shell completes the command."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from lightning_revbn.cli.terminal import CommandError

__all__ = ["PrintCompletion"]


class PrintCompletion(argparse.Action):
    """Prints the completion of a parser and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Print the script for the named shell.

        Raises:
            CommandError: If shtab is not installed.
        """
        try:
            shtab: Any = import_module("shtab")
        except ImportError as error:
            raise CommandError('completion needs shtab: pip install "lightning-revbn[cli]"') from error
        for action in _actions(parser):
            if action.type is Path or action.dest == "target":  # a target may be a file too
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue] # shtab reads this attribute
        print(shtab.complete(parser, values))  # noqa: T201
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its commands."""
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage] # argparse has no public list of its arguments
        yield action
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage] # as above
            for command in cast("dict[str, argparse.ArgumentParser]", vars(action)["choices"]).values():
                yield from _actions(command)
