"""Two hosts on one machine: network namespaces, joined by a cable that can be slow or cut, with `torchrun` in each.

Linux alone has network namespaces, and making them takes root, also of a user namespace, and the program `ip`. All
addresses are inside the namespaces, and nothing outside of them can be reached.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from helpers.processes import run_process
from helpers.scripts import ROOT, search_path

RANKS = 2
"""Ranks on each host."""
PORT = 29511
SCRIPTS = ROOT / "tests/processes/scripts"


class NoNamespacesError(Exception):
    """This machine does not let us make network namespaces; the message says why, and what to do."""


class End(NamedTuple):
    """How a host's `torchrun` has ended."""

    code: int
    output: str
    """Standard output and standard error, of all ranks."""
    time: float
    """When it ended, as `time.time()` says it."""


class Host:
    """A network namespace.

    Args:
        name: The name of the namespace.
        address: The address of its end of the cable.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.end_of_cable = "cable"

    def command(self, *words: object) -> list[object]:
        """Return a command line that runs a command on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def processes(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """Kill all processes of the host, among them those that they start meanwhile."""
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def lose_power(self) -> None:
        """Kill all processes after the cable is cut, so that their connections do not end but fall silent."""
        _ip("-n", self.name, "link", "set", self.end_of_cable, "down")
        self.kill()

    def repair(self) -> None:
        """Join the host to the cable again."""
        _ip("-n", self.name, "link", "set", self.end_of_cable, "up")

    def sent(self) -> int:
        """Return how many bytes the host has sent over the cable."""
        lines = _call(self.command("cat", "/proc/net/dev")).splitlines()
        (counters,) = (line.split(":")[1] for line in lines if line.split(":")[0].strip() == self.end_of_cable)
        return int(counters.split()[8])


class Hosts(NamedTuple):
    """Two hosts and their cable."""

    first: Host
    second: Host

    def torchrun(
        self,
        script: str,
        *arguments: object,
        env: Sequence[Mapping[str, str]] = ({}, {}),
        meanwhile: Callable[[Callable[[Path], None]], object] | None = None,
    ) -> tuple[End, End]:
        """Run a script of `tests/processes/scripts/` on both hosts, and return how each has ended.

        Args:
            script: Name of the script.
            arguments: Its arguments.
            env: Variables of each host.
            meanwhile: Called while both run, with a function that waits for a file that they write.
        """

        def run(node: int) -> End:
            options = ["--nnodes", 2, "--nproc-per-node", RANKS, "--node-rank", node]
            options += ["--master-addr", self.first.address, "--master-port", PORT]
            command = [sys.executable, "-m", "torch.distributed.run", *options, SCRIPTS / script, *arguments]
            own = {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": search_path(ROOT, ROOT / "tests"),
                "GLOO_SOCKET_IFNAME": self[node].end_of_cable,
                **env[node],
            }
            done = run_process(self[node].command(*command), env=own, check=False)
            return End(done.returncode, done.stdout + done.stderr, time.time())

        with ThreadPoolExecutor() as pool:
            ends = [pool.submit(run, node) for node in range(2)]
            try:
                if meanwhile is not None:
                    meanwhile(lambda file: wait_for(file, ends))
                first, second = (end.result() for end in ends)
            except BaseException:  # the pool waits for both
                for host in self:
                    host.kill()
                raise
        return first, second

    def slow_down(self, rate: str) -> None:
        """Let a number of bits a second through the cable, each way.

        Args:
            rate: The rate as `tc` reads it, such as "1mbit".
        """
        for host in self:
            options = ["dev", host.end_of_cable, "root", "tbf", "rate", rate, "burst", "4kb", "latency", "10s"]
            _call(["tc", "-n", host.name, "qdisc", "add", *options])


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make two hosts, and remove them at the end with all that runs on them.

    Yields:
        The hosts.

    Raises:
        NoNamespacesError: If the machine does not allow it.
    """
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise NoNamespacesError("there is no program `ip` or `tc`: install iproute2")
    hosts = Hosts(*(Host(f"revbn-{os.getpid()}-{n}", f"10.213.0.{n}") for n in (1, 2)))
    made: list[Host] = []
    _remove_leftovers()
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            made.append(host)
        ends = [host.end_of_cable for host in hosts]
        between = ["type", "veth", "peer", "name", ends[1], "netns", hosts.second.name]
        _ip("-n", hosts.first.name, "link", "add", ends[0], *between)
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.end_of_cable)
            for link in ("lo", host.end_of_cable):
                _ip("-n", host.name, "link", "set", link, "up")
        yield hosts
    finally:
        for host in made:
            host.kill()
            _ip("netns", "delete", host.name)


def _remove_leftovers() -> None:
    """Remove the hosts of processes that were killed before they could."""
    for name in (line.split()[0] for line in _ip("netns", "list").splitlines()):
        ours = re.fullmatch(r"revbn-(\d+)-\d", name)
        if ours and not Path("/proc", ours[1]).exists():
            Host(name, "").kill()
            _ip("netns", "delete", name)


def wait_for(file: Path, ends: Sequence[Future[End]], seconds: float = 300) -> None:
    """Wait until the programs of hosts have written a file.

    Args:
        file: The file.
        ends: The ends of the hosts' programs.
        seconds: How long to wait.

    Raises:
        AssertionError: If a host ends without the file. The message has the host's output.
        TimeoutError: If the file is not there in time.
    """
    limit = time.monotonic() + seconds
    while not file.exists():
        ended = [end.result() for end in ends if end.done()]
        if ended and not file.exists():
            raise AssertionError(
                f"a host ended with {ended[0].code} before {file} was written\n{ended[0].output[-12000:]}"
            )
        if time.monotonic() > limit:
            raise TimeoutError(f"{file} was not written in {seconds:.0f} seconds")
        time.sleep(0.05)


def _ip(*words: str) -> str:
    return _call(["ip", *words])


def _call(command: Sequence[object]) -> str:
    done = run_process(command, check=False)
    if done.returncode:
        raise NoNamespacesError(
            f"`{' '.join(done.args)}` says {done.stderr.strip()!r}: two hosts take network namespaces, and so root or, "
            "as in `make test-hosts`, a user namespace"
        )
    return done.stdout
