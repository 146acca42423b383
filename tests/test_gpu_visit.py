"""`python -m benchmarks.gpu`: the whole command, tried in small on a CPU, and what it does where a part fails."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.scripts import ROOT, Done, run_python
from torch import Tensor
from torch.autograd import DeviceType

sys.path.insert(0, str(ROOT))

from benchmarks.gpu.device import Device, kernels_among
from benchmarks.gpu.input_norm import Arm, compare
from benchmarks.gpu.page import page
from benchmarks.gpu.parts import PARTS, Visit, read_outcomes, run_limited
from benchmarks.gpu.report import Report

CPU = {"kind": "cpu", "name": "a CPU", "python": "3", "torch": "2", "lightning": "2", "timm": None}
CUDA = {**CPU, "kind": "cuda", "name": "a GPU", "memory_bytes": 2**36, "capability": "9.0", "cuda": "13"}
GRAPH = "test_replays_follow_a_schedule"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command wrote."""
    folder = tmp_path_factory.mktemp("visit")
    visit("--output", folder, "--device", "cpu", "--small", "--tests", GRAPH)
    return folder


def visit(*arguments: object, **options: Any) -> Done:
    return run_python("-m", "benchmarks.gpu", *arguments, cwd=ROOT, **options)


def test_every_part_runs_and_its_figures_are_in_the_json(output: Path) -> None:
    results = json.loads((output / "gpu.json").read_text())
    assert results["device"]["kind"] == "cpu"
    assert results["small"] is True
    parts = results["parts"]
    assert {name: (part["outcome"], part["reason"]) for name, part in parts.items()} == {
        part.name: ("ok", "") for part in PARTS
    }
    names = {name: [figure["name"] for figure in part["figures"]] for name, part in parts.items()}
    assert "callback, monitor, mixin: waits of the package in a step" in names["waits"]
    assert "mode batch, compiled, channels last, uint8 to bfloat16" in names["input_norm"]
    assert names["training"] == ["the same again", "callback", "callback, monitor", "callback, monitor, mixin"]
    figures = [figure for part in parts.values() for figure in part["figures"]]
    assert all(figure["value"] >= 0 for figure in figures)
    assert {figure["limit"] for figure in figures} == {None, 0, 1, 2, 1.01, 1.03, 1.15, 1.3, 2.5}
    assert parts["tests"]["failed"] == []
    assert parts["tests"]["passed"]
    assert all(GRAPH in test for test in parts["tests"]["passed"])


def test_the_page_says_that_nothing_was_run_on_a_gpu(output: Path) -> None:
    text = (output / "gpu.md").read_text()
    assert "**Nothing here was run on a GPU.**" in text
    for part in PARTS:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {part.title} |")]
        assert row.endswith("| no |")
    assert "| yes |" not in text
    assert "- Not run: torch.compile (it is switched off here" in text


def test_without_a_gpu_the_command_says_that_nothing_is_run(tmp_path: Path) -> None:
    done = visit("--output", tmp_path / "none", check=False, env={"CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout) == (2, "")
    assert "not run: torch finds no GPU" in done.stderr
    assert not (tmp_path / "none").exists()


def test_a_part_that_fails_is_told_by_the_end_of_its_output(tmp_path: Path) -> None:
    code = "print('measuring'); raise ZeroDivisionError('of no use')"
    result = run_limited([sys.executable, "-c", code], 60, tmp_path / "log", {})
    assert result["outcome"] == "failed"
    assert result["reason"].endswith("ZeroDivisionError: of no use")


def test_a_part_that_takes_too_long_is_ended_with_the_processes_that_it_has_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    result = run_limited([sys.executable, "-c", code], 5, tmp_path / "log", {})
    assert (result["outcome"], result["reason"]) == ("ran out of time", "the limit is 5 s")
    child = int(note.read_text())
    end = time.monotonic() + 30  # a killed process runs on until the system gets to it
    while _is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_a_part_for_which_no_time_is_left_is_skipped_and_told_so(tmp_path: Path) -> None:
    found = Visit("cuda", False, tmp_path, "", time.monotonic()).run(PARTS[0])
    assert (found["outcome"], found["reason"]) == ("skipped", "no time was left")
    text = page({"device": CUDA, "small": False, "seconds": 0.0, "parts": {PARTS[0].name: found}})
    assert f"| {PARTS[0].title} | skipped | 0 | no |" in text
    assert f"| {PARTS[1].title} | not asked for | | no |" in text


@pytest.mark.parametrize(
    ("value", "device", "verdict"), [(1.2, CUDA, "yes"), (1.4, CUDA, "**no**"), (1.2, CPU, "not run")]
)
def test_a_figure_is_judged_by_its_limit_on_a_gpu_alone(value: float, device: dict[str, Any], verdict: str) -> None:
    figure = {"name": "mode batch", "value": value, "low": 1.0, "high": 1.5, "limit": 1.3}
    part = {"outcome": "ok", "reason": "", "seconds": 1.0, "figures": [figure], "skipped": [], "notes": []}
    text = page({"device": device, "small": False, "seconds": 1.0, "parts": {"input_norm": part}})
    assert f"| mode batch | {value:.3f} (1.000 to 1.500) | 1.3 | {verdict} |" in text


def test_kernels_count_without_the_names_of_the_regions_above_them() -> None:
    def event(kind: DeviceType, microseconds: float, *, is_name: bool = False) -> Any:
        spent = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(device_type=kind, is_user_annotation=is_name, time_range=spent)

    kernels = [event(DeviceType.CUDA, 20.0), event(DeviceType.CUDA, 30.0)]
    others = [event(DeviceType.CPU, 400.0), event(DeviceType.CUDA, 60.0, is_name=True)]
    assert kernels_among([*others, *kernels]) == (2, pytest.approx(50e-6))


class Queue:
    """A GPU without work: it sleeps until the host waits, or launches more kernels than its queue holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, holds: int) -> None:
        self.holds, self.launched, self.sleeps = holds, 0, False
        event = SimpleNamespace(record=lambda: None, query=lambda: not self.sleeps, elapsed_time=lambda end: 6.0)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)

    def wait(self) -> None:
        self.launched, self.sleeps = 0, False

    def sleep(self, cycles: int) -> None:
        self.sleeps = True

    def launch(self, kernels: int) -> None:
        self.launched += kernels
        if self.launched > self.holds:
            self.wait()


@pytest.mark.parametrize(("kernels", "calls"), [(4, 5), (255, 2), (1000, 1)])
def test_so_many_calls_are_measured_as_a_gpu_can_queue(
    kernels: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(monkeypatch, holds=1024)
    assert Device("cuda").queued_seconds(lambda: queue.launch(kernels), 5) == 6e-3 / calls


def test_a_call_in_which_the_host_waits_cannot_be_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch, holds=1024)
    with pytest.raises(RuntimeError, match="the host waits for the device within a call"):
        Device("cuda").queued_seconds(queue.wait, 5)


def test_a_way_that_fails_is_told_and_the_others_are_measured(tmp_path: Path) -> None:
    def broken(images: Tensor) -> Tensor:
        raise NotImplementedError("no kernel\nfor a reason")

    report = Report(Device("cpu"), True, tmp_path / "part.json")
    arms = {"broken": Arm(broken, 1), "sound": Arm(lambda images: images.float(), 1)}
    compare(report, "contiguous", "float32", arms, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), queued=True)
    written = json.loads((tmp_path / "part.json").read_text())
    assert [figure["name"] for figure in written["figures"]] == ["sound, contiguous, uint8 to float32"]
    what = "broken, contiguous, uint8 to float32"
    assert written["skipped"] == [{"what": what, "reason": "NotImplementedError: no kernel"}]
    assert report.failed == [what]


def test_a_part_has_no_more_time_than_is_left(tmp_path: Path) -> None:
    (part,) = [part for part in PARTS if part.name == "tests"]
    found = Visit("cpu", True, tmp_path, "two_ranks_learn", time.monotonic() + 6).run(part)
    assert found["outcome"] == "ran out of time"
    assert found["reason"] in ("the limit is 6 s", "the limit is 5 s")


@pytest.mark.parametrize(("device", "patience", "limit"), [("cuda", 1.0, 60), ("cuda", 2.0, 120), ("cpu", 1.0, 240)])
def test_a_part_has_its_own_limit_times_the_patience_of_the_visit(
    device: str, patience: float, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def run(command: object, seconds: float, *others: object) -> dict[str, Any]:
        limits.append(seconds)
        return {"outcome": "ok", "reason": "", "seconds": 0.0}

    monkeypatch.setattr("benchmarks.gpu.parts.run_limited", run)
    (training,) = [part for part in PARTS if part.name == "training"]
    Visit(device, True, tmp_path, "", time.monotonic() + 1000, patience).run(training)
    assert limits == [limit]


def test_tests_that_were_not_reached_are_told(tmp_path: Path) -> None:
    written = tmp_path / "tests.json"
    entries = [
        {"chosen": ["first", "second", "third"]},
        {"test": "first", "outcome": "passed", "seconds": 1.0, "reason": ""},
        {"test": "second", "outcome": "failed", "seconds": 1.0, "reason": "1 is not 2"},
    ]
    written.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = read_outcomes(written)
    assert (found["passed"], [entry["test"] for entry in found["failed"]]) == (["first"], ["second"])
    assert {"what": "third", "reason": "not reached"} in found["skipped"]
