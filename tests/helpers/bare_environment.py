"""Environments with this package as a user installs it: from its wheel, beside the dependencies that it asks for.

The dependencies are links to those of the tests' environment, so that nothing is downloaded. Packages that this package
does not ask for are not there, nor is any file of the repository: without extras there is no scipy and no matplotlib.
"""

from __future__ import annotations

import sys
import venv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from helpers.processes import run_process
from helpers.scripts import ROOT

CLEAN = {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1"}
"""Variables with which an interpreter finds its own packages alone."""


def build_distributions(folder: Path, source: Path = ROOT) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the sdist, into a folder; return both paths."""
    run_process([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source])
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@dataclass(frozen=True)
class BareEnvironment:
    """An environment in a folder of its own."""

    folder: Path

    @property
    def bin(self) -> Path:
        """The folder of the interpreter and the commands."""
        return self.folder / "bin"

    @property
    def packages(self) -> Path:
        """The folder from which packages are imported."""
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def run(self, *command: object, env: dict[str, str] | None = None, **options: Any) -> Any:
        """Run a command of the environment by its name, `python` for one; options go to `run_process`."""
        return run_process([self.bin / str(command[0]), *command[1:]], env={**CLEAN, **(env or {})}, **options)


class Environments(NamedTuple):
    bare: BareEnvironment
    extras: BareEnvironment
    """With the extras `compare` and `plots`, and the packages that pages ask for by name."""


def make_environment(
    folder: Path, wheel: Path, extras: Sequence[str] = (), also: Sequence[str] = ()
) -> BareEnvironment:
    """Make an environment and install a wheel in it, with extras.

    Args:
        folder: The environment's folder, which does not exist.
        wheel: The wheel of this package.
        extras: Extras of the package.
        also: Names of further packages, as a page asks its readers to install them.

    Returns:
        The environment.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    made = BareEnvironment(folder)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        made.bin / "python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    run_process([*pip, wheel], env=CLEAN)
    (own,) = distributions(name="lightning-revbn", path=[str(made.packages)])
    needed: dict[str, Distribution] = {}
    _collect(own.requires or [], frozenset(extras), needed)
    _collect(also, frozenset(), needed)
    for found in needed.values():
        _link(found, made.packages)
    return made


def _collect(requirements: Iterable[str], extras: frozenset[str], into: dict[str, Distribution]) -> None:
    """Collect the installed distributions that requirements ask for, and what those ask for."""
    for requirement in map(Requirement, requirements):
        wanted = [{"extra": extra} for extra in (*extras, "")]
        if requirement.marker and not any(map(requirement.marker.evaluate, wanted)):
            continue
        key = f"{requirement.name.lower()}[{','.join(sorted(requirement.extras))}]"
        if key not in into:
            into[key] = _installed(requirement.name)
            _collect(into[key].requires or [], frozenset(requirement.extras), into)


@cache
def _installed(name: str) -> Distribution:
    return distribution(name)


def _link(found: Distribution, packages: Path) -> None:
    """Link the modules and the metadata of a distribution into a folder of packages."""
    tops = {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        link = packages / top
        if not link.exists():  # distributions may share a namespace package
            link.symlink_to(Path(str(found.locate_file(top))))
