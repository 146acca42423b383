"""Training steps of a ResNet-50 in bf16 and channels last, with and without the callback, its monitor and the mixin.

The images are bytes on the device. Arms train in turns, each round from another first arm; a figure is the ratio to the
arm without the package in the same round. Every measurement has one logging step.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from helpers.lit import trainer
from helpers.models import residual_net

from benchmarks.gpu.device import Device
from benchmarks.gpu.report import Report, run_part
from lightning_revbn import InputNorm, OnlineInputNormMixin, RevisitedBatchNorm

BASE = "without the package"
WARM = 5
"""Steps before a measurement."""


class Network(L.LightningModule):
    """A classifier that is trained by SGD."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


class Images(L.LightningDataModule):
    """The same batch of bytes at every step, on the device."""

    def __init__(self, batch: tuple[Tensor, Tensor], steps: int, **options: Any) -> None:
        super().__init__(**options)
        self.batch, self.steps = batch, steps

    def train_dataloader(self) -> Any:
        """Return the batches."""
        return DataLoader([self.batch] * self.steps, batch_size=None)  # type: ignore[arg-type]


class Constant(Images):
    """Normalised by constants."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch as floats."""
        return batch[0].float().sub_(127.5).mul_(1 / 73.6), batch[1]


class Online(OnlineInputNormMixin, Images):
    """Normalised by the batch."""

    def __init__(self, *args: Any, compile: bool) -> None:
        super().__init__(*args, input_norm=InputNorm(3, scale=1.0, compile=compile))


class Clock(L.Callback):
    """Measures the steps after the first ones: the last callback, so that a step ends when all others have ended it."""

    def __init__(self, device: Device, steps: int) -> None:
        self.device, self.steps = device, steps
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock, or read it."""
        if batch_idx in (WARM - 1, WARM + self.steps - 1):
            self.device.wait()
            self.seconds = time.perf_counter() - self.seconds


def step_seconds(
    device: Device, network: Network, callbacks: list[L.Callback], data: L.LightningDataModule, steps: int
) -> float:
    """Train a copy of the network, and return the seconds of a step."""
    clock = Clock(device, steps)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "accelerator": "gpu" if device.is_gpu else "cpu",
            "devices": 1,
            "max_epochs": 1,
            "precision": "bf16-mixed",
            "log_every_n_steps": steps,
            "logger": CSVLogger(folder),
        }
        trainer(Path(folder), *callbacks, clock, **options).fit(copy.deepcopy(network), data)
    return clock.seconds / steps


def workload(report: Report) -> tuple[Network, tuple[Tensor, Tensor]]:
    """Return the network, on the CPU, and a batch on the device."""
    if report.small:
        model, shape, classes = residual_net(), (4, 3, 6, 6), 5
    else:
        import timm

        model, shape, classes = timm.create_model("resnet50"), (128, 3, 224, 224), 1000
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=report.device.kind)
    targets = torch.randint(0, classes, shape[:1], device=report.device.kind)
    model = model.to(memory_format=torch.channels_last)
    return Network(model), (images.contiguous(memory_format=torch.channels_last), targets)


def measure(report: Report) -> None:
    """Train the arms in turns, and write down the ratios after every round from the second on."""
    torch.backends.cudnn.benchmark = True
    rounds, steps = (2, 4) if report.small else (5, 20)
    network, batch = workload(report)
    size = batch, WARM + steps
    arms: dict[str, Callable[[], tuple[list[L.Callback], L.LightningDataModule]]] = {
        BASE: lambda: ([], Constant(*size)),
        "the same again": lambda: ([], Constant(*size)),
        "callback": lambda: ([RevisitedBatchNorm(monitor=False)], Constant(*size)),
        "callback, monitor": lambda: ([RevisitedBatchNorm()], Constant(*size)),
        "callback, monitor, mixin": lambda: ([RevisitedBatchNorm()], Online(*size, compile=False)),
    }
    if report.small:
        report.skip("the mixin with compile=True", "compiling takes a minute on a CPU")
    else:
        arms["callback, monitor, mixin compiled"] = lambda: ([RevisitedBatchNorm()], Online(*size, compile=True))
    limits = {"callback": 1.01, "callback, monitor": 1.01, "callback, monitor, mixin": 1.03}
    step_seconds(report.device, network, *arms[BASE](), steps)  # finds its kernels
    names, times = list(arms), {name: list[float]() for name in arms}
    for round_ in range(rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(step_seconds(report.device, network, *arms[name](), steps))
        report.content["figures"].clear()
        for name in names[1:]:
            ratios = [own / base for own, base in zip(times[name], times[BASE], strict=True)]
            report.add(name, ratios, limits.get(name), detail=f"{len(ratios)} rounds")
    middle = sorted(times[BASE])[rounds // 2]
    report.note(f"{BASE}: {1e3 * middle:.2f} ms a step, batches of {len(batch[1])}, {rounds} rounds of {steps} steps.")


if __name__ == "__main__":
    run_part(measure)
