"""Runs the code of a notebook in one process, as Jupyter would; test_tutorial.py starts it.

    python run_notebook.py NOTEBOOK

It needs the standard library alone, where nbclient would bring a kernel and forty packages. Lines that begin with `!`
go to the shell. Standard output gets a JSON list: what each cell of code has printed to its standard output.
"""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import subprocess
import sys
from typing import Any


def shell(command: str) -> None:
    """Run a command and print what it writes, as Jupyter does for a line that begins with `!`."""
    sys.stdout.write(subprocess.run(command, shell=True, check=True, stdout=subprocess.PIPE, text=True).stdout)


def translated(source: str) -> str:
    lines = source.splitlines()
    return "\n".join(f"_shell({line[1:]!r})" if line.startswith("!") else line for line in lines)


def run(notebook: dict[str, Any]) -> list[str]:
    names: dict[str, Any] = {"__name__": "__main__", "_shell": shell}
    outputs: list[str] = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(translated("".join(cell["source"])), f"cell {number}", "exec"), names)
            outputs.append(printed.getvalue())
    return outputs


if __name__ == "__main__":
    with pathlib.Path(sys.argv[1]).open(encoding="utf-8") as file:
        read = json.load(file)
    print(json.dumps(run(read)))
