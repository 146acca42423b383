"""Runs a process to its end, and kills it if it hangs. A hang is a time without progress, not a long run."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

PATIENCE = 300.0
"""Seconds without progress that count as a hang. A busy machine makes a process slow, but does not stop it."""
BUSY = 0.03
"""The share of a core below which a process tree makes no progress. A rank that waits in a FileStore uses 0.01."""
LIMIT = 3600.0
"""Seconds after which even a busy process is killed: it may be in an endless loop, or the system has no /proc."""

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
MARK = "REVBN_TESTS_PROCESS"
_NUMBERS = itertools.count()


class Progress:
    """Judges by output and CPU time whether a process tree makes progress.

    Args:
        start: The time in seconds when the process started.
        patience: Seconds that count as a hang if they pass without output and with less than `BUSY` of a core in use.
    """

    def __init__(self, start: float, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._last = start
        self._cpu = 0.0
        self._output = 0

    def is_stuck(self, now: float, cpu: float, output: int) -> bool:
        """Update with the CPU seconds that the living processes have used and the bytes written, and judge."""
        used = cpu - self._cpu  # negative after a process has ended, which is progress
        if output > self._output or used < 0 or used >= BUSY * self.patience:
            self._last, self._cpu, self._output = now, cpu, output
        return now - self._last >= self.patience


def run_process(
    command: Sequence[object],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    patience: float = PATIENCE,
    limit: float = LIMIT,
    clock: Callable[[], float] = time.monotonic,
) -> subprocess.CompletedProcess[str]:
    """Run a command until all its processes have ended, and return its exit code and output.

    Args:
        command: The program and its arguments.
        cwd: The working directory of the command.
        env: Variables in addition to the environment of this process.
        check: Whether an exit code other than 0 is an error.
        patience: Seconds without progress after which the command is killed.
        limit: Seconds after which the command is killed in any case.
        clock: Returns the time in seconds.

    Returns:
        The exit code, standard output and standard error.

    Raises:
        TimeoutError: If the command made no progress, or took longer than the limit. The message has its output, and
            the stack of each of its Python threads.
        AssertionError: If the command ended with an exit code other than 0. The message has its output.
    """
    words = [str(word) for word in command]
    # With PYTHONFAULTHANDLER, Python writes the stack of each thread on SIGABRT.
    mark = f"{os.getpid()}.{next(_NUMBERS)}"
    environment = {**os.environ, **(env or {}), "PYTHONFAULTHANDLER": "1", MARK: mark}
    with TemporaryFile() as stdout, TemporaryFile() as stderr:
        files = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
        process = subprocess.Popen(words, cwd=cwd, env=environment, **files)
        tree = _Tree(process, mark)

        def written() -> int:
            return sum(os.fstat(file.fileno()).st_size for file in (stdout, stderr))

        try:
            trouble = _wait(tree, written, Progress(clock(), patience), limit, clock)
            if trouble:
                tree.send(signal.SIGABRT)
                tree.wait(60)
        finally:
            tree.send(signal.SIGKILL)  # after an error, processes may be left
            process.wait()
        texts: list[str] = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    done = subprocess.CompletedProcess(words, process.returncode, *texts)
    said = f"\n--- standard output\n{done.stdout[-3000:]}\n--- standard error\n{done.stderr[-12000:]}"
    if trouble:
        raise TimeoutError(f"{' '.join(words)}\n{trouble}{said}")
    if check:
        assert done.returncode == 0, f"{' '.join(words)}\nended with {done.returncode}{said}"
    return done


def kill_process(command: Sequence[object], when: Callable[[], bool], *, env: Mapping[str, str]) -> None:
    """Start a command, and kill all its processes as soon as a condition holds.

    Args:
        command: The program and its arguments.
        when: The condition, which is asked every hundredth of a second.
        env: Variables in addition to the environment of this process.

    Raises:
        AssertionError: If the command ended before, or the condition did not hold within `PATIENCE`.
    """
    mark = f"{os.getpid()}.{next(_NUMBERS)}"
    with TemporaryFile() as output:
        files = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        words = [str(word) for word in command]
        process = subprocess.Popen(words, env={**os.environ, **env, MARK: mark}, **files)
        tree, end = _Tree(process, mark), time.monotonic() + PATIENCE
        try:
            while not when() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
            killed = process.poll() is None and time.monotonic() < end
        finally:
            tree.send(signal.SIGKILL)
            assert tree.wait(60)
        output.seek(0)
        assert killed, output.read().decode(errors="replace")[-12000:]


def _wait(tree: _Tree, written: Callable[[], int], progress: Progress, limit: float, clock: Callable[[], float]) -> str:
    """Wait until a process has failed, or all processes of its tree have ended; return a reason to kill them, or ""."""
    start, seconds = clock(), 0.05
    while not tree.wait(seconds):
        seconds = min(2 * seconds, 1.0)
        if tree.process.returncode:  # its descendants may wait for it forever
            return ""
        now = clock()
        if now - start >= limit:
            return f"took longer than {limit:.0f} seconds"
        if PROC.exists() and progress.is_stuck(now, sum(member.cpu for member in tree.members()), written()):
            return f"made no progress for {progress.patience:.0f} seconds: neither output nor use of the CPU"
    return ""


class _Member(NamedTuple):
    pid: int
    cpu: float
    """CPU seconds of the process and of its ended children."""


class _Tree:
    """A process and its descendants, including orphans: all inherit an environment variable that identifies them.

    A separate session would identify them too, but a signal that ends the tests from outside would not reach it.
    """

    def __init__(self, process: subprocess.Popen[bytes], mark: str) -> None:
        self.process = process
        self._mark = f"{MARK}={mark}".encode()

    def members(self) -> list[_Member]:
        """Return the living processes of the tree; empty on a system without /proc."""
        found: list[_Member] = []
        for folder in PROC.glob("[0-9]*"):
            try:
                if self._mark not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                # The second field, in brackets, is the program's name, which may hold spaces and brackets.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # the process has just ended, or belongs to another user
                continue
            found.append(_Member(int(folder.name), sum(map(int, fields[11:15])) / TICKS))
        return found

    def wait(self, seconds: float) -> bool:
        """Wait at most this number of seconds, and return whether all processes have ended."""
        end = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        while not self._has_ended():
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all living processes."""
        self.process.send_signal(number)
        for member in self.members():
            if member.pid != self.process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, number)

    def _has_ended(self) -> bool:
        return self.process.poll() is not None and not self.members()
