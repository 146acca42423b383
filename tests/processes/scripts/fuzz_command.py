"""Gives `inspect` targets, and LIGHTNING_REVBN values, as nobody means them: each must end in a result or one line.

`make fuzz` gives many, and test_fuzz.py some. Prints how many ended in which, the greatest memory, and the seed of each
that ended otherwise.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from helpers.hostile import environment_value, target
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_revbn.cli.main import main
from lightning_revbn.switches.environment_callback import callback_from

_LONGEST = 2100


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _not_a_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def try_target(seed: int, folder: Path) -> str:
    """Inspect a target in a random way, and say how it ended.

    Raises:
        AssertionError: If it ended in neither a result nor one line.
    """
    random_ = random.Random(seed)
    wanted = target(seed, folder)
    options = random_.choice([[], ["--json"], ["--sort", "scale_mean"], ["--sort", "name", "--json"]])
    out, err = random_.choice([io.StringIO, _Terminal])(), io.StringIO()
    os.environ["COLUMNS"] = str(random_.choice([1, 20, 60, 80, 200]))
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["inspect", *options, "--", wanted])
    if code == 0:
        assert err.getvalue() == "", "a result came with an error"
        assert out.getvalue(), "a result is empty"
        if "--json" in options:
            json.loads(out.getvalue(), parse_constant=_not_a_number).keys()
            out.getvalue().encode("ascii")
        else:
            plain = out.getvalue().replace("\x1b[0m", "").replace("\x1b[1m", "").replace("\x1b[3m", "")
            assert all(line.isprintable() for line in plain.split("\n")), "a line of a table does not print"
        return "a result"
    assert (code, out.getvalue()) == (1, ""), "an error came with a result"
    _check_line(err.getvalue().removesuffix("\n"))
    return "one line"


def try_value(seed: int, folder: Path) -> str:
    """Make the callback of a value, and say how it ended.

    Raises:
        AssertionError: If it ended in neither a callback nor one line.
    """
    try:
        callback_from(environment_value(seed, folder), "LIGHTNING_REVBN")
    except MisconfigurationException as error:
        _check_line(str(error))
        return "one line"
    return "a result"


def _check_line(line: str) -> None:
    assert line.isprintable(), "an error does not print on one line"
    assert len(line) <= _LONGEST, f"an error has {len(line)} characters"


def _end(name: str, seed: int, attempt: Callable[[int, Path], str], folder: Path) -> str:
    try:
        return attempt(seed, folder)
    except BaseException:
        sys.stderr.write(f"{name}, seed {seed}:\n{traceback.format_exc()[-2000:]}\n")
        return "otherwise"


def run() -> int:
    """Try all of them.

    Returns:
        The exit code: 1 if any ended otherwise.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--values", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, count, attempt in (
            ("targets", arguments.targets, try_target),
            ("values", arguments.values, try_value),
        ):
            seeds = range(arguments.seed, arguments.seed + count)
            ends = Counter(_end(name, seed, attempt, Path(folder)) for seed in seeds)
            failed |= "otherwise" in ends
            told = ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))
            sys.stdout.write(f"{count} {name} (seeds {seeds.start} to {seeds.stop - 1}): {told}\n")
    # Not getrusage: a process that was just started has the greatest memory of the one that started it.
    status = Path("/proc/self/status").read_text()
    greatest = int(status.partition("VmHWM:")[2].split()[0]) // 1000
    sys.stdout.write(f"greatest memory: {greatest} MB\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(run())
