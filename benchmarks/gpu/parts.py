"""The parts of a visit: each a process with a time limit, whose failure does not end the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import outcomes

__all__ = ["PARTS", "Part", "Visit", "read_outcomes", "run_limited"]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: What the command line and the JSON call it.
        title: What the page calls it.
        seconds: Its time limit.
    """

    name: str
    title: str
    seconds: float


PARTS = (
    Part("waits", "Where the host waits for the device", 30),
    Part("input_norm", "Input normalisation against the copy bandwidth", 75),
    Part("training", "Training steps", 60),
    Part("tests", "Tests", 120),
)
"""In the order in which they run. The tests have what the others leave of four minutes, and can be run alone."""


@dataclass(frozen=True)
class Visit:
    """What all parts have in common.

    Attributes:
        device: `"cuda"` or `"cpu"`.
        small: Whether the code is only tried.
        output: The folder of JSON, page and logs.
        tests: Which tests to run, as `pytest -k` takes it; empty for all.
        deadline: When all parts must have ended, as `time.monotonic()` tells it.
        patience: How many times its own limit a part may take.
    """

    device: str
    small: bool
    output: Path
    tests: str
    deadline: float
    patience: float = 1.0

    def run(self, part: Part) -> dict[str, Any]:
        """Run a part.

        Args:
            part: Which one.

        Returns:
            What became of it, with everything that it wrote down.
        """
        # On a CPU only the code is tried, and the machine may be busy.
        own = part.seconds * (self.patience if self.device == "cuda" else max(4.0, self.patience))
        limit = min(own, self.deadline - time.monotonic())
        if limit < 5:
            return {"outcome": "skipped", "reason": "no time was left", "seconds": 0.0, **_NOTHING}
        written = self.output / f"{part.name}.json"
        written.unlink(missing_ok=True)
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        if part.name == "tests":
            command, read = self._pytest(), read_outcomes
            environment[outcomes.FILE] = str(written)
            environment |= {name: os.environ.get(name, value) for name, value in _OF_TESTS.items()}
        else:
            command, read = self._measurement(part, written), _figures
        log = self.output / f"{part.name}.log"
        result = run_limited([sys.executable, *command], limit, log, environment)
        result |= read(written)
        if part.name == "tests" and result["outcome"] == "failed" and result["failed"]:
            result["reason"] = f"{len(result['failed'])} tests failed"
        return result

    def _measurement(self, part: Part, written: Path) -> list[str]:
        small = ["--small"] * self.small
        return ["-m", f"benchmarks.gpu.{part.name}", "--device", self.device, *small, "--json", str(written)]

    def _pytest(self) -> list[str]:
        # Other versions of torch and Lightning have warnings of their own, which must not hide what the tests say.
        options = ["-q", "-W", "default", "-p", "benchmarks.gpu.outcomes", "-p", "no:cacheprovider"]
        marks = "gpu and not two_gpus" if self.device == "cuda" else "not gpu"
        return ["-m", "pytest", *options, "-m", marks, *(["-k", self.tests] if self.tests else []), "tests/gpu"]


_OF_TESTS = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever else is installed there
    # All ranks are here. Otherwise gloo looks up the name of the machine, for which no server may answer.
    **({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
}
"""What the environment of the tests has, where it says nothing else."""

_NOTHING: dict[str, list[Any]] = {"figures": [], "skipped": [], "notes": []}


def run_limited(command: Sequence[str], limit: float, log: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a command with all processes that it starts, and end them together when the time is over.

    Args:
        command: The program and its arguments.
        limit: Seconds.
        log: Where its output goes.
        environment: Variables that are set beside those of this process.

    Returns:
        `outcome` is `"ok"`, `"failed"` or `"ran out of time"`; `reason` is the end of its output where it is not ok.
    """
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own processes can be ended with it
        )
        try:
            outcome = "failed" if process.wait(limit) else "ok"
        except subprocess.TimeoutExpired:
            outcome = "ran out of time"
        finally:
            _end(process)
    lines = log.read_text(errors="replace").strip().splitlines()
    reason = {"ok": "", "ran out of time": f"the limit is {limit:.0f} s"}.get(outcome, "\n".join(lines[-6:]))
    return {"outcome": outcome, "reason": reason, "seconds": round(time.monotonic() - start, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _figures(written: Path) -> dict[str, Any]:
    return json.loads(written.read_text()) if written.exists() else dict(_NOTHING)


def read_outcomes(written: Path) -> dict[str, Any]:
    """Sort the tests by what became of them."""
    lines = written.read_text().splitlines() if written.exists() else []
    entries = [json.loads(line) for line in lines]
    tests = [entry for entry in entries if "outcome" in entry]
    chosen = [test for entry in entries for test in entry.get("chosen", ())]
    skipped = [{"what": entry["test"], "reason": entry["reason"]} for entry in tests if entry["outcome"] == "skipped"]
    ended = {entry["test"] for entry in tests}
    skipped += [{"what": test, "reason": "not reached"} for test in chosen if test not in ended]
    skipped.append({"what": "tests marked two_gpus or deepspeed", "reason": "make test-gpu and make test-deepspeed"})
    return {
        **_NOTHING,
        "skipped": skipped,
        "passed": [entry["test"] for entry in tests if entry["outcome"] == "passed"],
        "failed": [entry for entry in tests if entry["outcome"] == "failed"],
        "warnings": sorted({entry["warning"] for entry in entries if "warning" in entry}),
    }
