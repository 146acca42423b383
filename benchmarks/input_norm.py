"""Measures the cost of input normalisation (time, memory, communication) against batch norm and offline constants."""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.lit import trainer
from helpers.ranks import end_rank, join_process_group
from helpers.raw import Collectives

from lightning_revbn import InputNorm, OnlineInputNormMixin
from lightning_revbn.core.input_checks import InputPart
from lightning_revbn.core.input_norm import OnlineStandardizer
from lightning_revbn.core.joint_training import InputParts, train_together

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SHAPE = (128, 3, 224, 224)


def in_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Call functions in turns, and return the seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():  # the first calls compile kernels and fill caches
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], name: str, other: str) -> str:
    """Return the median over rounds of the ratio within a round, with quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times[name], times[other], strict=True)], n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def bare(images: Tensor) -> Tensor:
    """Standardise by the arithmetic alone, with constants in units of bytes."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return images.float().sub_(mean).mul_(1 / std)


def frozen() -> OnlineStandardizer:
    """Return a standardiser whose statistics are fixed after a single sample."""
    standardizer = OnlineStandardizer(InputNorm(3, freeze_after=1))
    standardizer.train(torch.randint(0, 256, (1, *SHAPE[1:]), dtype=torch.uint8))
    return standardizer


def speed(threads: int, rounds: int) -> None:
    """Print the ratios of times for whole batches."""
    torch.set_num_threads(threads)
    images = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    layer, standardizer, after = nn.BatchNorm2d(3), OnlineStandardizer(InputNorm(3)), frozen()
    compiled = OnlineStandardizer(InputNorm(3, compile=True))
    offline = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    torch.compiler.reset()  # kernels are compiled for a number of threads
    compiled_layer = torch.compile(lambda values: layer(values.float()))
    compiled_offline = torch.compile(offline)
    with torch.no_grad():
        times = in_turns(
            {
                "mode batch": lambda: standardizer.train(images),
                "mode batch, compiled": lambda: compiled.train(images),
                "x.float() + BatchNorm2d": lambda: layer(images.float()),
                "v2 ToDtype + Normalize": lambda: offline(images),
                "x.float() + BatchNorm2d, compiled": lambda: compiled_layer(images),
                "v2 ToDtype + Normalize, compiled": lambda: compiled_offline(images),
                "freeze_after passed": lambda: after.train(images),
                "bare arithmetic": lambda: bare(images),
            },
            rounds,
        )
    print(f"uint8 {'x'.join(map(str, SHAPE))}, {threads} thread(s), {rounds} rounds, ratio in one round")
    for name, other in (
        ("mode batch", "x.float() + BatchNorm2d"),
        ("mode batch", "v2 ToDtype + Normalize"),
        ("mode batch, compiled", "x.float() + BatchNorm2d"),
        ("mode batch, compiled", "v2 ToDtype + Normalize"),
        ("mode batch, compiled", "x.float() + BatchNorm2d, compiled"),
        ("mode batch, compiled", "v2 ToDtype + Normalize, compiled"),
        ("freeze_after passed", "bare arithmetic"),
    ):
        print(f"{name:<20} / {other:<33} {ratio(times, name, other)}")
    print("medians: " + ", ".join(f"{name} {1e3 * statistics.median(own):.0f} ms" for name, own in times.items()))


def settings_cost(threads: int, rounds: int) -> None:
    """Print what settings and several places cost, against mode batch without them on values of the same size."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(65536, 64, generator=generator)
    table[:, 32:] = (table[:, 32:] > 1).float()  # one-hot columns
    scenes = torch.randint(100, 3000, (16, 4, 256, 256), generator=generator).short()
    holes = scenes.clone()
    holes[..., :51] = -9999  # a fifth, at the edge of the swath
    images = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    inputs = [OnlineStandardizer(InputNorm(3)) for _ in range(3)]
    times = in_turns(
        {
            "table": training(64, [table]),
            "table, channels": training(64, [table], channels=range(32)),
            "table, clip": training(64, [table], clip=10.0),
            "rasters": training(4, [scenes]),
            "rasters, nodata": training(4, [holes], nodata=-9999),
            "float rasters": training(4, [scenes.float()]),
            "float rasters, nodata": training(4, [holes.float()], nodata=-9999),
            "images": training(3, [images]),
            "images, two views": training(3, [*images.chunk(2)]),
            "images, three inputs": lambda: train_inputs(inputs, [[part] for part in images.chunk(3)]),
        },
        rounds,
    )
    print(f"settings, {threads} thread(s), {rounds} rounds, ratio in one round: float32 {shape_of(table)}, ", end="")
    print(f"int16 {shape_of(scenes)}, uint8 {shape_of(images)}")
    for name in times:
        plain = name.split(", ")[0]
        if name != plain:
            print(f"{name:<21} / {plain:<13} {ratio(times, name, plain)}")
    print("medians: " + ", ".join(f"{name} {1e3 * statistics.median(own):.0f} ms" for name, own in times.items()))


def training(width: int, parts: list[Tensor], **settings: Any) -> Callable[[], object]:
    """Return what trains on the parts of a batch, which lie at as many places."""
    standardizer = OnlineStandardizer(InputNorm(width, **settings))
    return lambda: train_inputs([standardizer], [parts])


def train_inputs(standardizers: list[OnlineStandardizer], parts: list[list[Tensor]]) -> object:
    """Train on a batch as the mixin does: some parts for each input."""
    inputs = [
        InputParts("", online, [InputPart(values) for values in own])
        for online, own in zip(standardizers, parts, strict=True)
    ]
    return train_together(inputs, torch.float32, None, 1, torch.device("cpu"))


def shape_of(values: Tensor) -> str:
    """Return the shape of a tensor as text."""
    return "x".join(map(str, values.shape))


def peak_memory() -> None:
    """Print the peak of a call's extra memory, relative to the size of its result."""
    torch.set_num_threads(1)
    images = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    standardizer = OnlineStandardizer(InputNorm(3))
    standardizer.train(images[:8])
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    result = standardizer.train(images)
    taken, size = status("VmHWM") - before, result.numel() * result.element_size() / 1024
    print(f"peak of extra memory / size of the result: {taken / size:.3f} (result {size / 1024:.1f} MiB)")


def status(field: str) -> int:
    """Return a field of this process's memory status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def communicate(rank: int, folder: str) -> None:
    """Count the collectives of two ranks."""
    join_process_group(rank, 2, Path(folder))
    standardizer = OnlineStandardizer(InputNorm(3, freeze_after=8 * 2 * 5))
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    with Collectives() as learning:
        for _ in range(5):
            standardizer.train(images, ranks=2)
    with Collectives() as otherwise:
        for _ in range(5):
            standardizer.train(images, ranks=2)
            standardizer.evaluate(images)
            standardizer.preview(images)
    if rank == 0:
        print(f"collectives in 5 training steps of 2 ranks: {learning.count}; frozen, evaluation: {otherwise.count}")
    end_rank()


class Photos(L.LightningDataModule):
    """Random images as bytes."""

    def train_dataloader(self) -> Any:
        """Return the same batch 12 times."""
        batch = torch.randint(0, 256, (16, *SHAPE[1:]), dtype=torch.uint8), torch.randint(0, 1000, (16,))
        return DataLoader([batch] * 12, batch_size=None)  # type: ignore[arg-type]


class Offline(Photos):
    """Normalises by known constants."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch as floats."""
        return bare(batch[0]), batch[1]


class Online(OnlineInputNormMixin, Photos):
    """Normalises by the statistics of the batch."""

    def __init__(self) -> None:
        super().__init__(input_norm=InputNorm(3, scale=1.0))


class Network(L.LightningModule):
    """A ResNet-18 that records the start of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torchvision.models.resnet18()
        self.starts: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss, and record the time; a step lasts until the next step begins."""
        self.starts.append(time.perf_counter())
        return cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def step_seconds(data: L.LightningDataModule) -> float:
    """Return the median seconds of a training step."""
    network = Network()
    with tempfile.TemporaryDirectory() as folder:
        trainer(Path(folder), max_epochs=1, log_every_n_steps=50).fit(network, data)
    return statistics.median(b - a for a, b in zip(network.starts[1:], network.starts[2:], strict=False))


def training_step(rounds: int) -> None:
    """Print the time that the mixin adds to a network's training step."""
    torch.set_num_threads(2)
    times: dict[str, list[float]] = {"mixin": [], "constants": [], "constants again": []}
    for round_ in range(rounds):
        arms: list[tuple[str, L.LightningDataModule]] = [
            ("mixin", Online()),
            ("constants", Offline()),
            ("constants again", Offline()),
        ]
        # Another order each round, so that no arm profits from its place.
        for name, data in arms[round_ % 3 :] + arms[: round_ % 3]:
            times[name].append(step_seconds(data))
    print(f"training step of ResNet-18, 16x3x224x224 uint8, 2 threads, {rounds} rounds, ratio in one round")
    for name in ("mixin", "constants again"):
        print(f"{name:<16} / constants {ratio(times, name, 'constants')}")
    print(f"constants: {statistics.median(times['constants']):.2f} s")


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="rounds of the comparisons of batches (default: 25)")
    parser.add_argument("--steps", type=int, default=9, help="rounds of the training steps (default: 9)")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for threads in (1, 2):
        speed(threads, arguments.rounds)
        settings_cost(threads, arguments.rounds)
    # In a new process: reused memory of the measurements above would hide the peak.
    spawn = get_context("spawn")
    measured = spawn.Process(target=peak_memory)
    measured.start()
    measured.join()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(communicate, (folder,), nprocs=2)
    training_step(arguments.steps)


if __name__ == "__main__":
    main()
