"""Two hosts with two gloo ranks each, started by torchrun, against one process with the joined batch.

`make test-hosts` runs them: they take minutes, and root or user namespaces. On a machine that does not let them make
network namespaces they fail, and say why.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from helpers.joined_raw import assert_learned_the_same, assert_logged_the_same
from helpers.scripts import run_ranks
from helpers.two_hosts import End, Hosts, NoNamespacesError, two_hosts, wait_for

SCRIPT = "two_hosts.py"
SECONDS = 60
"""How long a refusal may take from the setup on, on a busy machine."""
TIMEOUT = 20
"""Seconds that a rank waits for another, as the script says it to DDP."""
DEATHS = {
    # Killed processes close their connections. A host without power does not, and gloo waits for its timeout.
    "kill": (0, "Connection (closed|reset) by peer|Connection reset"),
    "lose_power": (TIMEOUT, "Timed out waiting"),
}
"""How a host dies: seconds until the others learn of it, and what gloo says then."""
KILOBITS = 1000
"""What a slow cable lets through in a second, each way."""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        with two_hosts() as made:
            yield made
    except NoNamespacesError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_ranks(SCRIPT, "train", folder)
    return folder


@pytest.fixture(scope="module")
def trained_on_two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Hosts], Path]:
    """Train on two hosts at the first call, and return the folder."""
    folder = tmp_path_factory.mktemp("two")

    def train(hosts: Hosts) -> Path:
        if not (folder / "rank0.pt").exists():
            assert_ended_well(hosts.torchrun(SCRIPT, "train", folder))
        return folder

    return train


def assert_ended_well(ends: tuple[End, End]) -> None:
    for end in ends:
        assert end.code == 0, end.output[-12000:]


@pytest.mark.two_hosts
def test_two_hosts_learn_and_log_what_one_process_does_with_the_joined_batch(
    hosts: Hosts, trained_on_two: Callable[[Hosts], Path], one_process: Path
) -> None:
    folder = trained_on_two(hosts)
    assert_learned_the_same(folder, one_process, ranks=4)
    assert_logged_the_same(folder, one_process)
    values = torch.load(folder / "rank0.pt", weights_only=True)["values"]
    assert 0 < (values["model.bn1.weight"] - 0.1).abs().max() < 0.01


@pytest.mark.two_hosts
def test_ranks_of_a_second_host_without_the_variable_are_refused_by_number(hosts: Hosts, tmp_path: Path) -> None:
    first, second = refusal(hosts, tmp_path, [{"LIGHTNING_REVBN": "1"}, {"LIGHTNING_REVBN": ""}])
    assert "ranks have different settings: ranks 2-3 have no RevisitedBatchNorm, ranks 0-1 have" in first.output
    assert "where LIGHTNING_REVBN switches the callback on, set it on every node" in first.output
    # No code of this package runs there: gloo says that the other ranks have gone.
    assert "ranks have different settings" not in second.output


@pytest.mark.two_hosts
def test_hosts_with_other_settings_are_refused_on_both_over_a_slow_cable_too(hosts: Hosts, tmp_path: Path) -> None:
    hosts.slow_down("500kbit")
    ends = refusal(hosts, tmp_path, [{"LIGHTNING_REVBN": "1"}, {"LIGHTNING_REVBN": "scale=0.2"}])
    for end in ends:
        assert "RevisitedBatchNorm: scale=0.1 on ranks 0-1, scale=0.2 on ranks 2-3" in end.output


def refusal(hosts: Hosts, folder: Path, env: list[dict[str, str]]) -> tuple[End, End]:
    ends = hosts.torchrun(SCRIPT, "variable", folder, env=env)
    last = max(float((folder / f"setup{rank}").read_text()) for rank in range(4))
    for end in ends:
        assert end.code != 0
        assert end.time - last < SECONDS
    return ends


@pytest.mark.two_hosts
@pytest.mark.parametrize("death", DEATHS)
def test_when_a_host_dies_amid_a_step_the_other_ends_and_the_last_checkpoint_resumes_on_two_hosts(
    death: str, hosts: Hosts, one_process: Path, tmp_path: Path
) -> None:
    waits, said = DEATHS[death]
    died: list[float] = []

    def kill(wait: Callable[[Path], None]) -> None:
        for rank in (2, 3):
            wait(tmp_path / f"stopped{rank}")
        time.sleep(2)  # the first host waits for gradients by then
        died.append(time.time())
        getattr(hosts.second, death)()

    first, second = hosts.torchrun(SCRIPT, "stop", tmp_path, meanwhile=kill)
    assert second.code == -signal.SIGKILL
    assert first.code == 1
    assert re.search(said, first.output), first.output[-12000:]
    assert waits <= first.time - died[0] + 2 < waits + SECONDS
    assert not hosts.first.processes()
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert [file.stem for file in saved] == ["step=1", "step=2", "step=3"]

    hosts.second.repair()
    assert_ended_well(hosts.torchrun(SCRIPT, "train", tmp_path / "resumed", saved[-1]))
    assert_learned_the_same(tmp_path / "resumed", one_process, ranks=4)


@pytest.mark.two_hosts
def test_over_a_slow_cable_training_is_the_same_and_slower(
    hosts: Hosts, trained_on_two: Callable[[Hosts], Path], tmp_path: Path
) -> None:
    fast = trained_on_two(hosts)
    hosts.slow_down(f"{KILOBITS}kbit")
    before = hosts.first.sent()
    start = time.monotonic()
    assert_ended_well(hosts.torchrun(SCRIPT, "train", tmp_path))
    seconds, sent = time.monotonic() - start, hosts.first.sent() - before
    assert_learned_the_same(tmp_path, fast, ranks=4)
    assert sent > 100_000
    assert seconds > 0.9 * 8 * sent / (1000 * KILOBITS)  # the cable has let through no more than that


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ({}, "there is no program `ip` or `tc`: install iproute2"),
        (
            {"ip": "echo Operation not permitted >&2; exit 1", "tc": "exit 0"},
            "says 'Operation not permitted': two hosts",
        ),
    ],
)
def test_a_machine_that_allows_no_second_host_is_told_why(
    programs: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoNamespacesError, match=re.escape(said)), two_hosts():
        pass


def test_a_host_that_ends_early_ends_the_wait_for_its_file_with_its_output(tmp_path: Path) -> None:
    running, ended = Future[End](), Future[End]()
    ended.set_result(End(1, "ValueError: no such optimizer", time.time()))
    with pytest.raises(AssertionError, match=r"a host ended with 1 before .*stopped2 was written\nValueError: no such"):
        wait_for(tmp_path / "stopped2", [running, ended])
    (tmp_path / "stopped2").touch()
    wait_for(tmp_path / "stopped2", [running, ended])
