"""Runs the Python of pages, each page in a process and a folder of its own; test_code_blocks.py starts it.

It imports the standard library and Lightning alone, for it runs where the package is installed without the repository.
Its argument is a JSON file: `filters` of warnings, and `pages`, each with a `folder` and with `blocks` of names
and code that share a namespace. Standard output gets what each page printed, with a traceback where a block failed.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import multiprocessing
import os
import pathlib
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any

import lightning.pytorch  # noqa: F401 - the processes of all pages share this import


def run_page(blocks: list[list[str]]) -> str:
    """Run blocks one after the other, and return what they printed, or the traceback of the first that fails."""
    namespace: dict[str, Any] = {"__name__": "page"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        name = ""
        try:
            for name, code in blocks:
                exec(compile(code, name, "exec"), namespace)
        except Exception:
            return f"{name} fails:\n{traceback.format_exc()}"
    return printed.getvalue()


def set_filters(filters: list[str]) -> None:
    """Set filters of warnings as pytest writes them: `action`, or `action:message:category`."""
    for entry in filters:
        action, _, rest = entry.partition(":")
        message, _, category = rest.rpartition(":")
        warnings.filterwarnings(action, message, getattr(builtins, category or "Warning"))  # type: ignore[arg-type]


def in_process(page: dict[str, Any], filters: list[str], answer: Connection) -> None:
    os.chdir(page["folder"])
    sys.path[0] = ""  # as in a session there, where modules of the folder can be imported
    set_filters(filters)
    answer.send(run_page(page["blocks"]))


if __name__ == "__main__":
    with pathlib.Path(sys.argv[1]).open(encoding="utf-8") as file:
        asked = json.load(file)
    said: dict[str, str] = {}
    for name, page in asked["pages"].items():
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=in_process, args=(page, asked["filters"], theirs))
        process.start()
        theirs.close()
        said[name] = ours.recv()
        process.join()
    print(json.dumps(said))
