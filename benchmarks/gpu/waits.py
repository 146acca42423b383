"""Where the host waits for the device in a training step, with and without the callback, its monitor and the mixin.

On a GPU torch tells it (`torch.cuda.set_sync_debug_mode`); it does not see every wait. On a CPU, where nothing waits,
the operations count of which the host reads the result.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from helpers.host_waits import host_waits, of_package
from helpers.lit import LitNet, trainer

from benchmarks.gpu.report import Report, run_part
from lightning_revbn import InputNorm, OnlineInputNormMixin, RevisitedBatchNorm

STEPS, LOGGED_EVERY, SETTLED = 24, 6, 6
"""Steps of a run, the steps between logging steps, and the steps at first in which things are found out."""
SAMPLES = 64
"""Samples of a batch: enough that all advice on the data, which reads them, is given by the first logging step."""


class Images(L.LightningDataModule):
    """Bytes on the device."""

    def __init__(self, device: str, **options: Any) -> None:
        super().__init__(**options)
        self.inputs = torch.randint(0, 256, (SAMPLES, 3, 6, 6), dtype=torch.uint8, device=device)
        self.targets = torch.randint(0, 5, (SAMPLES,), device=device)

    def train_dataloader(self) -> Any:
        """Return the same batch for every step."""
        return DataLoader([(self.inputs, self.targets)] * STEPS, batch_size=None)  # type: ignore[arg-type]


class Constant(Images):
    """Normalised by constants."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch as floats."""
        return batch[0].float().sub_(127.5).mul_(1 / 73.6), batch[1]


class Online(OnlineInputNormMixin, Images):
    """Normalised by the batch."""

    def __init__(self, device: str) -> None:
        super().__init__(device, input_norm=InputNorm(3, scale=1.0))


class Boundaries(L.Callback):
    """Notes how many waits there were at the end of every step."""

    def __init__(self, places: list[str]) -> None:
        self.places = places
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the number."""
        self.counts.append(len(self.places))


def adamw(module: Any) -> Any:
    """Configure AdamW with a schedule that changes the learning rate at every step."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def waits_of_steps(device: str, callbacks: list[L.Callback], data: L.LightningDataModule) -> list[list[str]]:
    """Train, and return the places of waits step by step."""
    with tempfile.TemporaryDirectory() as folder, host_waits(device) as places:
        boundaries = Boundaries(places)
        options: dict[str, Any] = {
            "accelerator": "gpu" if device == "cuda" else "cpu",
            "devices": 1,
            "max_epochs": 1,
            "precision": "bf16-mixed",
            "log_every_n_steps": LOGGED_EVERY,
            "logger": CSVLogger(folder),
        }
        trainer(Path(folder), *callbacks, boundaries, **options).fit(LitNet(adamw), data)
        ends = [0, *boundaries.counts]
    return [places[start:end] for start, end in pairwise(ends)]


def measure(report: Report) -> None:
    """Count the waits of every arm, in settled steps and in logging steps."""
    device = report.device.kind
    arms: Mapping[str, tuple[list[L.Callback], L.LightningDataModule]] = {
        "without the package": ([], Constant(device)),
        "callback": ([RevisitedBatchNorm(monitor=False)], Constant(device)),
        "callback, monitor": ([RevisitedBatchNorm()], Constant(device)),
        "callback, monitor, mixin": ([RevisitedBatchNorm()], Online(device)),
    }
    for name, (callbacks, data) in arms.items():
        steps = waits_of_steps(device, callbacks, data)
        plain = [step for index, step in enumerate(steps) if index >= SETTLED and (index + 1) % LOGGED_EVERY]
        logging = [step for index, step in enumerate(steps) if index >= SETTLED and not (index + 1) % LOGGED_EVERY]
        copies = 2 if "mixin" in name else 1  # the monitor and the DataModule log by themselves
        for kind, chosen, limit in (("a step", plain, 0), ("a logging step", logging, copies)):
            own = [len(of_package(step)) for step in chosen]
            others = max(len(step) - len(of_package(step)) for step in chosen)
            detail = f"of others: {others}"
            report.add_figure(
                {"name": f"{name}: waits of the package in {kind}", "value": max(own), "limit": limit, "detail": detail}
            )
        for place, count in Counter(of_package([place for step in steps for place in step])).most_common():
            report.note(f"{name}, in {STEPS} steps, {count} times: `{place}`")
    if not report.device.is_gpu:
        report.skip("waits of the host", "on a CPU only the operations are counted of which the host reads the result")


if __name__ == "__main__":
    run_part(measure)
