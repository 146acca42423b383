"""Runs Python as a user does: a script of the repository, a module, a few lines of code, or the commands of a page."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from helpers.processes import kill_process, run_process

ROOT = Path(__file__).parents[2]
Done = subprocess.CompletedProcess[str]


def run_python(*arguments: object, env: Mapping[str, str] | None = None, **options: Any) -> Done:
    """Run the tests' interpreter with the package of this checkout; options go to `run_process`."""
    return run_process([sys.executable, *arguments], env={**_own_environment(), **(env or {})}, **options)


def run_script(name: str, *arguments: object, **options: Any) -> Done:
    """Run a script by its path from the root of the repository."""
    return run_python(ROOT / name, *arguments, **options)


def kill_script(name: str, *arguments: object, when: Callable[[], bool]) -> None:
    """Start a script by its path from the root of the repository, and kill it as soon as a condition holds."""
    kill_process([sys.executable, ROOT / name, *arguments], when, env=_own_environment())


def run_code(code: str) -> str:
    """Run lines of Python in a fresh interpreter, and return their output."""
    return run_python("-W", "ignore", "-c", code).stdout


def run_ranks(script: str, *arguments: object, env: Mapping[str, str] | None = None, **options: Any) -> str:
    """Run a script of `tests/processes/scripts/` and return its standard error.

    The scripts import these helpers; in a shell, most of them need `PYTHONPATH=.:tests`.
    """
    paths = {"PYTHONPATH": search_path(ROOT, ROOT / "tests")}
    path = f"tests/processes/scripts/{script}"
    return run_script(path, *arguments, env={**paths, **(env or {})}, **options).stderr


def run_shell(commands: str, folder: Path) -> str:
    """Run commands of a page in a folder, and return their output.

    `python` and the installed commands come from the tests' environment.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return run_process(["sh", "-ec", commands], cwd=folder, env={**_own_environment(), "PATH": path}).stdout


def _own_environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(ROOT)}


def search_path(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
