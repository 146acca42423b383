"""Measures the cost of BatchNormMonitor: events against `log_dict`, statistics, and watching activations."""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning as L
import timm
import torch
import torchvision
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_revbn import BatchNormMonitor, find_batch_norms
from lightning_revbn.core.activations import ActivationHooks, NormalizedActivations
from lightning_revbn.core.affine_statistics import AffineStatistics

WARM_UP = 3


class Clock(L.Callback):
    """Records the start of every batch: the time between two starts is a whole step, including all of its logging."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Record the time."""
        self.starts.append(time.perf_counter())

    @property
    def step(self) -> float:
        """Median seconds per step."""
        return statistics.median(b - a for a, b in zip(self.starts[WARM_UP:], self.starts[WARM_UP + 1 :], strict=False))


class Idle(L.LightningModule):
    """Holds a large network and trains a single number, so that logging is almost the whole cost of a step."""

    def __init__(self, network: nn.Module, keys: list[str]) -> None:
        super().__init__()
        self.network = network
        self.number = nn.Parameter(torch.ones(1))
        self.metrics = {key: torch.tensor(float(index)) for index, key in enumerate(keys)}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return a loss, and log the metrics, which are already computed."""
        if self.metrics:
            self.log_dict(self.metrics)
        return self.number.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD on the single number."""
        return torch.optim.SGD([self.number], lr=0.0)


def step_seconds(kind: type[Logger], keys: list[str], *callbacks: L.Callback, steps: int = 20) -> float:
    """Train some steps that all log.

    Args:
        kind: Class of the logger.
        keys: Keys that training_step logs by `log_dict`.
        callbacks: Callbacks of the Trainer.
        steps: Number of steps after the warm-up.

    Returns:
        Median seconds per step.
    """
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=WARM_UP + steps + 1,
            log_every_n_steps=1,
            logger=kind(folder),  # type: ignore[call-arg]
            callbacks=[clock, *callbacks],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Idle(torchvision.models.resnet152(), keys), DataLoader(torch.zeros(1000, 1)))
    return clock.step


def compare_events(rounds: int) -> None:
    names = [record.name for record in find_batch_norms(torchvision.models.resnet152())]
    computed = AffineStatistics(find_batch_norms(torchvision.models.resnet152())).compute()
    keys = [f"revbn/network.{key}" if "/" in key else f"revbn/{key}" for key in computed]
    print(f"one logging event, ResNet-152: {len(names)} layers, {len(keys)} keys, {rounds} rounds")
    print(f"{'logger':<20} {'log_dict':>10} {'monitor':>10}   log_dict / monitor (in one round)")
    for kind in (CSVLogger, TensorBoardLogger):
        rows: list[tuple[float, float]] = []
        for _ in range(rounds):
            bare = step_seconds(kind, [])
            monitored = step_seconds(kind, [], BatchNormMonitor(every_n_steps=1)) - bare
            rows.append((step_seconds(kind, keys) - bare, monitored))
        ratios = [logged / monitored for logged, monitored in rows]
        low, high = min(ratios), max(ratios)
        logged, monitored = (statistics.median(column) * 1e3 for column in zip(*rows, strict=True))
        print(
            f"{kind.__name__:<20} {logged:>7.1f} ms {monitored:>7.2f} ms   "
            f"{statistics.median(ratios):.0f} ({low:.0f} to {high:.0f})"
        )


def seconds(module: nn.Module, rounds: int) -> tuple[float, float]:
    """Return the median and the least time, in seconds, to compute the statistics of a model's layers."""
    measured = AffineStatistics(find_batch_norms(module))
    times: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        measured.compute()
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times)


def statistics_alone(rounds: int) -> None:
    print("the statistics alone")
    print(f"{'network':<22} {'channels':>9} {'median':>10} {'least':>10}   per layer")
    networks: dict[str, nn.Module] = {"ResNet-152": torchvision.models.resnet152()}
    for count in (10, 100, 300, 1_000):
        networks[f"{count} layers of 256"] = nn.Sequential(*(nn.BatchNorm2d(256) for _ in range(count)))
    for name, network in networks.items():
        records = find_batch_norms(network)
        middle, least = seconds(network, rounds)
        channels = sum(record.channels for record in records)
        print(
            f"{name:<22} {channels:>9,} {middle * 1e3:>7.3f} ms {least * 1e3:>7.3f} ms   "
            f"{middle / len(records) * 1e6:.1f} microseconds"
        )


def forward_seconds(network: nn.Module, images: Tensor, *, watched: bool) -> float:
    """Return seconds of a forward pass, with the activations of all layers measured or not."""
    records = find_batch_norms(network)
    metric = NormalizedActivations(len(records))
    start = time.perf_counter()
    with torch.no_grad():
        if watched:
            with ActivationHooks(records, metric):
                network(images)
            metric.compute()
        else:
            network(images)
    return time.perf_counter() - start


def watched_activations(rounds: int) -> None:
    print(f"a forward pass, activations watched / not watched: 8 images of 64 x 64, {rounds} rounds")
    print(f"{'network':<22} {'without':>10} {'with':>10}   ratio (quartiles, in one round)")
    images = torch.randn(8, 3, 64, 64)
    networks = {
        "torchvision resnet18": torchvision.models.resnet18(),  # torch's own layers
        "timm efficientnet_b0": timm.create_model("efficientnet_b0"),  # layers with a forward of their own
    }
    for name, network in networks.items():
        rows = [
            (forward_seconds(network, images, watched=False), forward_seconds(network, images, watched=True))
            for _ in range(WARM_UP + rounds)
        ][WARM_UP:]
        bare, watched = (statistics.median(column) * 1e3 for column in zip(*rows, strict=True))
        low, middle, high = statistics.quantiles((watched / bare for bare, watched in rows), n=4)
        print(f"{name:<22} {bare:>7.1f} ms {watched:>7.1f} ms   {middle:.2f} ({low:.2f} to {high:.2f})")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the comparison (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    statistics_alone(300)
    watched_activations(30)
    compare_events(arguments.rounds)


if __name__ == "__main__":
    main()
