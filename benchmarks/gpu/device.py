"""The device that is measured: its name, its clock, its copy bandwidth."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

__all__ = ["Device", "Times", "kernels_among"]

Times = dict[str, list[float]]
"""The seconds of a call in every round, by the name of the function."""


@dataclass(frozen=True)
class Device:
    """A device of torch.

    Attributes:
        kind: `"cuda"` or `"cpu"`.
    """

    kind: str

    @property
    def is_gpu(self) -> bool:
        """Whether figures are those of a GPU."""
        return self.kind == "cuda"

    def wait(self) -> None:
        """Let the host wait for all work."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object], calls: int) -> float:
        """Return the seconds of one of several calls in a row.

        The host waits before the first call and after the last, so either the device or the host's launches set the
        pace, as they do in training.
        """
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        self.wait()
        return (time.perf_counter() - start) / calls

    def queued_seconds(self, function: Callable[[], object], calls: int) -> float:
        """Return the device's seconds for one of several calls that the host has launched before the first one begins.

        In a training with a large network the host is ahead of the device. There, the launches of a call take no time
        of their own. A GPU queues about a thousand kernels, so where the host does not get ahead, fewer calls are
        measured.

        Raises:
            RuntimeError: If the host cannot launch a single call before the device begins.
        """
        if not self.is_gpu:
            return self.seconds(function, calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while calls:
            for cycles in (2**25, 2**28):  # some 20 and 150 ms
                self.wait()
                torch.cuda._sleep(cycles)
                begin.record()
                for _ in range(calls):
                    function()
                end.record()
                was_ahead = not begin.query()  # the device still sleeps, and all is launched
                self.wait()
                if was_ahead:
                    return begin.elapsed_time(end) / 1e3 / calls
            calls //= 2
        raise RuntimeError("the host waits for the device within a call, or takes longer to launch it than 150 ms")

    def in_turns(
        self, functions: Mapping[str, Callable[[], object]], rounds: int, calls: int, *, queued: bool = False
    ) -> Times:
        """Time functions in turns, each round from another first function, after two calls of each.

        Args:
            functions: What is called.
            rounds: How many times each is measured.
            calls: How many calls a measurement has, at most.
            queued: Whether the host launches all calls before the device begins.

        Returns:
            The seconds of a call, round by round.
        """
        for function in functions.values():
            function()
            function()
        names, times = list(functions), {name: list[float]() for name in functions}
        seconds = self.queued_seconds if queued else self.seconds
        for round_ in range(rounds):
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                times[name].append(seconds(functions[name], calls))
        return times

    def kernels(self, function: Callable[[], object]) -> tuple[int, float] | None:
        """Return how many kernels one call starts, and the seconds that the device works on them; None on a CPU."""
        if not self.is_gpu:
            return None
        from torch.profiler import ProfilerActivity, profile

        self.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            function()
            self.wait()
        return kernels_among(profiler.events() or ())

    def copy(self, size: int) -> tuple[Callable[[], object], int]:
        """Return a function that copies a buffer of a size in bytes, and the bytes that it reads and writes."""
        source = torch.empty(size, dtype=torch.uint8, device=self.kind).random_()
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2 * size

    def describe(self) -> dict[str, Any]:
        """Return what the figures depend on."""
        found: dict[str, Any] = {"kind": self.kind, "name": platform.processor() or platform.machine()}
        if self.is_gpu:
            properties = torch.cuda.get_device_properties(0)
            found |= {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "cuda": torch.version.cuda,
            }
        packages = ("torch", "lightning", "torchmetrics", "timm", "torchvision", "triton")
        return found | {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def kernels_among(events: Iterable[Any]) -> tuple[int, float]:
    """Return how many of the profiler's events are work of the device, and its seconds.

    Names that torch gives to regions of a program, such as compiled ones, lie above their kernels on the same device.
    """
    from torch.autograd import DeviceType

    found = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return len(found), sum(event.time_range.elapsed_us() for event in found) / 1e6


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
