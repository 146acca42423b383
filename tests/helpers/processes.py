"""Runs a process to its end, and ends it when it hangs: when it makes no progress, however long it has run."""

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
"""Seconds without progress after which a process hangs. A busy machine makes a process slow, but does not stop it."""
BUSY = 0.03
"""The share of a core below which a process tree makes no progress. A rank that waits in a FileStore uses 0.01."""
LIMIT = 3600.0
"""Seconds after which a process is ended although it is busy: an endless loop, or a system without /proc."""

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
MARK = "REVBN_TESTS_PROCESS"
_NUMBERS = itertools.count()


class Progress:
    """Judges by output and CPU time whether a process tree still does anything.

    Args:
        start: When the process started, in seconds.
        patience: Seconds without output, in which less than a share `BUSY` of a core is used, that are a hang.
    """

    def __init__(self, start: float, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._last = start
        self._cpu = 0.0
        self._output = 0

    def is_stuck(self, now: float, cpu: float, output: int) -> bool:
        """Look once more: `cpu` are the seconds that the living processes have used, `output` the bytes written."""
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
    """Run a command until all its processes have ended, and return its exit code and what it wrote.

    Args:
        command: The program and its arguments.
        cwd: The directory to run it in.
        env: Variables that are set beside those of this process.
        check: Whether an exit code other than 0 is an error.
        patience: Seconds without progress after which it is ended.
        limit: Seconds after which it is ended in any case.
        clock: Tells the seconds.

    Returns:
        The exit code, standard output and standard error.

    Raises:
        TimeoutError: It made no progress, or took longer than the limit. The message has what it wrote, and the stack
            of each of its Python threads.
        AssertionError: It ended with an exit code other than 0. The message has what it wrote.
    """
    words = [str(word) for word in command]
    # With PYTHONFAULTHANDLER, Python writes the stack of each thread when it gets SIGABRT.
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
            tree.send(signal.SIGKILL)  # nothing is left of it but after an error
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


def _wait(tree: _Tree, written: Callable[[], int], progress: Progress, limit: float, clock: Callable[[], float]) -> str:
    """Wait until a process has failed, or it and its descendants have ended; return why to end them, or nothing."""
    start, seconds = clock(), 0.05
    while not tree.wait(seconds):
        seconds = min(2 * seconds, 1.0)
        if tree.process.returncode:
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
    """Seconds that it has used, and its children that have ended."""


class _Tree:
    """A process and its descendants, also those whose parent has ended: they inherit a variable of the environment.

    A session of their own would tell them too, but what ends the tests from outside would not reach them then.
    """

    def __init__(self, process: subprocess.Popen[bytes], mark: str) -> None:
        self.process = process
        self._mark = f"{MARK}={mark}".encode()

    def members(self) -> list[_Member]:
        """Return what has not ended of the tree; nothing on a system without /proc."""
        found: list[_Member] = []
        for folder in PROC.glob("[0-9]*"):
            try:
                if self._mark not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                # The name of the program comes second, in brackets, and may hold anything.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended, or is another user's
                continue
            found.append(_Member(int(folder.name), sum(map(int, fields[11:15])) / TICKS))
        return found

    def wait(self, seconds: float) -> bool:
        """Return whether all have ended after so many seconds."""
        end = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        while not self._has_ended():
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all that have not ended."""
        self.process.send_signal(number)
        for member in self.members():
            if member.pid != self.process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, number)

    def _has_ended(self) -> bool:
        return self.process.poll() is not None and not self.members()
