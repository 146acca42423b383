"""Measures the cost of the installed package for scripts that do not use it: time until a Trainer exists, variable off.

Every run is a new process that imports the installed packages through a folder of links. A second folder leaves out
this package with its entry points. The three arms take turns, in another order each round. Figures are the median over
rounds of the ratio within a round, with quartiles, for the time on the clock and the CPU time. `without again` repeats
the same run and shows the noise. The CPU time of the entry point alone, in a process without other imports, does not
depend on the noise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import lightning_revbn

SCRIPT = "import lightning.pytorch as L; L.Trainer(logger=False)"
ENTRY_POINT = """
from time import process_time
start = process_time()
from lightning_revbn.switches.environment import callbacks
assert callbacks() == []
print(process_time() - start)
"""
LOADED = "; import sys; print('lightning_revbn.switches.environment' in sys.modules)"
ARMS = ("without", "with", "without again")


def link_packages(folder: Path, *, ours: bool) -> Path:
    """Fill a folder with links to the installed packages.

    Args:
        folder: The folder to make.
        ours: Whether to link this package too.

    Returns:
        The folder.
    """
    folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if ours or not path.name.startswith("lightning_revbn"):
            (folder / path.name).symlink_to(path)
    package = folder / lightning_revbn.__name__
    if ours and not package.exists():  # an editable installation is elsewhere
        package.symlink_to(Path(lightning_revbn.__file__).parent)
    return folder


def run(code: str, packages: Path) -> str:
    """Run code in a new process and return its output.

    Args:
        code: Python code.
        packages: The folder from which packages are imported.

    Returns:
        The standard output of the process.
    """
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    environment.pop("LIGHTNING_REVBN", None)
    command = [sys.executable, "-S", "-c", code]  # -S: only the packages of the folder
    done = subprocess.run(
        command, env=environment, cwd=packages.parent, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return done.stdout.decode()


def timed(packages: Path) -> tuple[float, float]:
    """Make a Trainer in a new process and return the seconds on the clock and of CPU time."""
    before, start = os.times(), time.perf_counter()
    run(SCRIPT, packages)
    clock, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return clock, used


def describe(values: list[float], digits: int = 3) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    """Print the ratios to the run without the package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the comparison (default: %(default)s)")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        absent = link_packages(Path(folder, "without"), ours=False)
        present = link_packages(Path(folder, "with"), ours=True)
        # The first runs fill the caches, and check that Lightning loads the entry point only from the folder with it.
        loaded = [run(SCRIPT + LOADED, packages).split()[-1] for packages in (absent, present)]
        if loaded != ["False", "True"]:
            raise SystemExit(f"the entry point was loaded without and with the package: {', '.join(loaded)}")
        packages = dict(zip(ARMS, (absent, present, absent), strict=True))
        times: list[dict[str, tuple[float, float]]] = []
        for turn in range(rounds):
            order = ARMS[turn % len(ARMS) :] + ARMS[: turn % len(ARMS)]
            times.append({arm: timed(packages[arm]) for arm in order})
        alone = [1000 * float(run(ENTRY_POINT, present)) for _ in range(rounds)]
    print(f'python -c "{SCRIPT}", {rounds} rounds, ratio in one round')
    print(f"{'':<24} {'time on the clock':<26} CPU time")
    for arm in ARMS[1:]:
        ratios = [[seconds[arm][kind] / seconds["without"][kind] for seconds in times] for kind in (0, 1)]
        print(f"{arm + ' / without':<24} {describe(ratios[0]):<26} {describe(ratios[1])}")
    clock, used = (statistics.median(seconds["without"][kind] for seconds in times) for kind in (0, 1))
    print(f"{'without':<24} {clock:.1f} s{'':<21} {used:.1f} s")
    print(f"{'the entry point alone':<24} {'':<26} {describe(alone, 2)} ms")


if __name__ == "__main__":
    main()
