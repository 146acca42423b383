"""Input normalisation of a batch of bytes, against the time in which the device copies so many bytes."""

from __future__ import annotations

import functools
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gpu.device import Times
from benchmarks.gpu.report import Report, run_part
from lightning_revbn import InputNorm
from lightning_revbn.core.input_norm import OnlineStandardizer

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SHAPE, SMALL_SHAPE = (256, 3, 224, 224), (4, 3, 32, 32)
COPIED, SMALL_COPIED = 2**30, 2**20
"""Bytes of the buffer that is copied to measure the bandwidth: much more than a cache holds."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Arm:
    """One way to normalise.

    Attributes:
        function: Takes the batch.
        reads: How often the method has to read it.
        limit: How many times the time of the copy it may take on a GPU; None where nothing is promised.
    """

    function: Callable[[Tensor], Tensor]
    reads: int
    limit: float | None = None

    def bytes_moved(self, images: Tensor, dtype: torch.dtype) -> int:
        """Return how many bytes the method has to read and write."""
        return images.numel() * (self.reads + dtype.itemsize)


def ours(dtype: torch.dtype, *, compile: bool, frozen: bool) -> Callable[[Tensor], Tensor]:
    """Return a training batch's way through the standardiser; `frozen` is so from its second batch on."""
    standardizer = OnlineStandardizer(InputNorm(3, compile=compile, freeze_after=1 if frozen else None))
    return functools.partial(standardizer.train, dtype=dtype, ranks=1)


def own_arms(dtype: torch.dtype) -> dict[str, Arm]:
    """Return the ways of this package."""
    make = functools.partial(ours, dtype)
    return {
        "mode batch, compiled": Arm(make(compile=True, frozen=False), 2, 1.3),
        "mode batch": Arm(make(compile=False, frozen=False), 2, 2.5),
        "freeze_after passed, compiled": Arm(make(compile=True, frozen=True), 1, 1.15),
        "freeze_after passed": Arm(make(compile=False, frozen=True), 1),
    }


def other_arms(report: Report, dtype: torch.dtype) -> dict[str, Arm]:
    """Return the ways beside it."""
    device = report.device.kind
    layer = nn.BatchNorm2d(3).to(device)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

    def batch_norm(images: Tensor) -> Tensor:
        return layer(images.float()).to(dtype)

    def kornia(images: Tensor) -> Tensor:  # its `normalize`, behind the division that its users write
        return ((images.float() / 255 - mean) / std).to(dtype)

    arms = {
        "x.float() + BatchNorm2d": Arm(batch_norm, 2),
        "x.float() + BatchNorm2d, compiled": Arm(torch.compile(batch_norm), 2),
        "kornia's formula": Arm(kornia, 1),
        "kornia's formula, compiled": Arm(torch.compile(kornia), 1),
    }
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # the latter where it was built for another torch
        report.skip("torchvision v2", str(error))
        return arms
    offline = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    return {**arms, "torchvision v2": Arm(lambda images: offline(images).to(dtype), 1)}


def compare(
    report: Report, layout: str, name: str, arms: dict[str, Arm], images: Tensor, *, queued: bool = False
) -> None:
    """Measure ways in turns with the copy, and write down how many times the copy of their bytes they take.

    Args:
        report: The report.
        layout: The name of the memory format.
        name: The name of the dtype of the results.
        arms: The ways.
        images: The batch.
        queued: Whether the host launches all calls before a GPU begins, as it does in a training whose network keeps
            the GPU busy. A way in which the host waits cannot be queued.
    """
    torch.compiler.reset()  # nothing is recompiled so often that torch gives up, and no size becomes a variable
    dtype, device, small = DTYPES[name], report.device, report.small
    copy, copied = device.copy(SMALL_COPIED if small else COPIED)
    calls = 1 if small else 5
    functions = {key: functools.partial(arm.function, images) for key, arm in arms.items()}
    for key, function in [*functions.items()]:
        attempt = functools.partial(device.in_turns, {key: function}, rounds=1, calls=1, queued=queued)
        if not works(report, f"{key}, {layout}, uint8 to {name}", attempt):
            del functions[key]
    times = device.in_turns({"copy": copy, **functions}, rounds=3 if small else 9, calls=calls, queued=queued)
    for key in functions:
        arm = arms[key]
        floor = [copied_in * arm.bytes_moved(images, dtype) / copied for copied_in in times["copy"]]
        ratios = [own / least for own, least in zip(times[key], floor, strict=True)]
        detail = f"{1e3 * statistics.median(times[key]):.3f} ms"
        if queued:
            alone = statistics.median(device.seconds(functions[key], calls) for _ in range(3))
            detail += f", {1e3 * alone:.3f} ms if the GPU has to wait for each launch"
        report.add(f"{key}, {layout}, uint8 to {name}", ratios, arm.limit, detail=detail)
    report.note(f"{layout}, uint8 to {name}: copied at {bandwidth(times, copied):.1f} GB/s in the same rounds.")


def works(report: Report, what: str, function: Callable[[], object]) -> bool:
    """Tell whether a function ends without an error; an error is written down, and the part goes on."""
    try:
        function()
    except Exception as error:  # a compiler may raise anything
        report.fail(what, error)
        return False
    return True


def tell_kernels(report: Report, layout: str, name: str, images: Tensor) -> None:
    """Write down how many times the copy of their bytes the kernels of the own ways take, without the host's launches.

    This comes after the ways are timed, since a profiler may leave launches slower than they were.
    """
    torch.compiler.reset()
    device, dtype = report.device, DTYPES[name]
    copy, copied = device.copy(SMALL_COPIED if report.small else COPIED)
    copy()
    of_copy = device.kernels(copy)
    for key, arm in own_arms(dtype).items():
        function = functools.partial(arm.function, images)
        for _ in range(3):
            function()
        kernels = device.kernels(function)
        what = f"kernels alone: {key}, {layout}, uint8 to {name}"
        if not (of_copy and kernels and of_copy[0] and kernels[0]):
            report.skip(what, "the profiler sees none")
            continue
        ratio = kernels[1] / (of_copy[1] * arm.bytes_moved(images, dtype) / copied)
        report.add_figure({"name": what, "value": ratio, "limit": None, "detail": f"{kernels[0]} kernels"})


def bandwidth(times: Times, copied: int) -> float:
    """Return the median bandwidth of the copy in GB/s, read and written bytes together."""
    return copied / statistics.median(times["copy"]) / 1e9


def same_bits(report: Report, layout: str, name: str, images: Tensor) -> None:
    """Write down whether the compiled way has the bits of the other."""
    dtype = DTYPES[name]
    ways = [ours(dtype, compile=compile, frozen=False) for compile in (True, False)]
    for way in ways:
        way(images)  # only later batches are a single graph
    results = [way(images) for way in ways]
    different = int((results[0] != results[1]).sum())
    report.add_figure(
        {"name": f"values in which compiled differs, {layout}, uint8 to {name}", "value": different, "limit": 0}
    )


def measure(report: Report) -> None:
    """Measure the ways of the package first, in every layout and dtype, then those beside it."""
    device, shape = report.device.kind, SMALL_SHAPE if report.small else SHAPE
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        report.skip("torch.compile", "it is switched off here, so what is called compiled is not")
    report.note(f"Batches of {'x'.join(map(str, shape))}; bytes that are read twice count twice.")
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    layouts = {layout: images.contiguous(memory_format=format_) for layout, format_ in LAYOUTS.items()}
    with torch.no_grad():
        for name in DTYPES:
            for layout, batch in layouts.items():
                compare(report, layout, name, own_arms(DTYPES[name]), batch, queued=True)
                check = functools.partial(same_bits, report, layout, name, batch)
                works(report, f"the same bits, {layout}, uint8 to {name}", check)
        if not report.device.is_gpu:
            report.skip("kernels alone", "a CPU has none")
        for name in DTYPES if report.device.is_gpu else ():
            for layout, batch in layouts.items():
                tell = functools.partial(tell_kernels, report, layout, name, batch)
                works(report, f"kernels alone, {layout}, uint8 to {name}", tell)
        for name in DTYPES:
            for layout, batch in layouts.items():
                compare(report, layout, name, other_arms(report, DTYPES[name]), batch)


if __name__ == "__main__":
    if "--small" in sys.argv:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute on a CPU
        import torch._dynamo.config

        torch._dynamo.config.disable = os.environ["TORCHDYNAMO_DISABLE"] == "1"
    run_part(measure)
