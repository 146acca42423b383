"""The runner of processes: what hangs is ended with its output and its stack, what is only slow is not."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.processes import BUSY, Progress, run_process

SLEEP = """
import sys, time
def wait_for_ever():
    time.sleep(1e6)
print("asleep", flush=True)
print("in vain", file=sys.stderr, flush=True)
open(sys.argv[1], "w").close()
wait_for_ever()
"""
# Uses the CPU for 1 second, and tells a file how much it has used: nothing is output.
WORK = """
import os, sys, time
while time.process_time() < 1:
    with open(sys.argv[1] + ".new", "w") as file:
        file.write(str(time.process_time()))
    os.replace(sys.argv[1] + ".new", sys.argv[1])
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
"""
# Its parent ends at once, and tells the id of the child that lives on.
ORPHAN = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]])
print(child.pid, flush=True)
"""


def leaps_after(file: Path) -> Callable[[], float]:
    """Return a clock that stands still until there is a file, and then goes on by 1,000 seconds with every look."""
    leaps = itertools.count(1)
    return lambda: 1000.0 * next(leaps) if file.exists() else 0.0


def test_a_process_that_sleeps_is_ended_and_its_output_and_stack_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "sleeps"
    with pytest.raises(TimeoutError, match="made no progress for 300 seconds") as raised:
        run_process([sys.executable, "-c", SLEEP, file], clock=leaps_after(file))
    said = str(raised.value)
    assert "asleep" in said
    assert "in vain" in said
    assert "in wait_for_ever" in said


def test_a_child_that_outlives_its_parent_is_waited_for_and_ended(tmp_path: Path) -> None:
    file = tmp_path / "sleeps"
    with pytest.raises(TimeoutError, match="made no progress") as raised:
        run_process([sys.executable, "-c", ORPHAN, file, SLEEP], clock=leaps_after(file))
    said = str(raised.value)
    assert "in wait_for_ever" in said
    (pid,) = (line for line in said.splitlines() if line.isdigit())
    status = Path("/proc", pid, "stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_slow_process_without_output_is_not_ended_while_it_uses_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "used"

    # A machine on which the process gets a tenth of a core, however busy this one is.
    def clock() -> float:
        return 10 * float(file.read_text()) if file.exists() else 0.0

    run_process([sys.executable, "-c", WORK, file], patience=2, clock=clock)
    assert clock() > 4


def test_a_process_that_is_busy_for_ever_is_ended_by_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "busy"
    code = "import sys\nopen(sys.argv[1], 'w').close()\nwhile True: pass"
    with pytest.raises(TimeoutError, match="took longer than 900 seconds"):
        run_process([sys.executable, "-c", code, file], limit=900, clock=leaps_after(file))


def test_an_exit_code_is_an_error_that_shows_the_output_unless_it_is_asked_for() -> None:
    command = [sys.executable, "-c", "import sys; print('before'); sys.exit('no data')"]
    with pytest.raises(AssertionError, match=r"ended with 1\n(.*\n)+before\n(.*\n)+no data"):
        run_process(command)
    done = run_process(command, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "before\n", "no data\n")


def test_progress_is_output_or_a_share_of_a_core_or_the_end_of_a_process() -> None:
    share = 10 * BUSY

    def stuck_at(*looks: tuple[float, float, int]) -> list[float]:
        progress = Progress(0, patience=10)
        return [now for now, cpu, output in looks if progress.is_stuck(now, cpu, output)]

    assert stuck_at((9, 0, 0), (10, 0, 0), (11, 0, 0)) == [10, 11]
    assert stuck_at((9, 0, 1), (18, 0, 1), (19, 0, 1)) == [19]
    assert stuck_at((9, share, 0), (18, 1.9 * share, 0), (19, 1.9 * share, 0), (20, 3 * share, 0)) == [19]
    assert stuck_at((9, share, 0), (18, 0, 0), (27, 0, 0), (28, 0, 0)) == [28]
