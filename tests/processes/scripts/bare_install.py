"""Installs a wheel without extras in an environment that has nothing else, and uses it there; `make dist` runs it.

    PYTHONPATH=.:tests python tests/processes/scripts/bare_install.py dist/*.whl torch==2.14.1

pip brings the dependencies, where the test of the same checks links them.
"""

from __future__ import annotations

import argparse
import tempfile
import venv
from pathlib import Path

from helpers.bare_environment import BareEnvironment
from helpers.installed_package import check_installed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path, help="the wheel of this package")
    parser.add_argument("requirements", nargs="*", help="versions to install with it, such as torch==2.14.1")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "environment")
        venv.EnvBuilder(symlinks=True, with_pip=True).create(folder)
        environment = BareEnvironment(folder)
        environment.run("pip", "install", "--quiet", arguments.wheel.resolve(), *arguments.requirements)
        environment.run("pip", "check")
        work = Path(temporary, "work")
        work.mkdir()
        print(environment.run("pip", "list", "--format=freeze").stdout)
        print(check_installed(environment, work))


if __name__ == "__main__":
    main()
