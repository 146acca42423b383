"""The paper's protocol: a baseline against a grid of scales, over paired seeds, the scale chosen on validation data.

    python research/paper_protocol.py digits
    python research/paper_protocol.py fashion-mnist --train-images 5000 --epochs 30 --seeds 8
    python research/paper_protocol.py cifar10 --network resnet18 --data-dir data --epochs 180 --accelerator gpu

Every run is a directory with Lightning's CSV log and a `result.json`, which is written when the run is finished: a
second call of the same command trains only what is missing. `lightning-revbn compare` reads the same logs.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import lightning as L
import torch
import torchvision
from digits import Digits, DigitsResNet, PaperRecipe, derive_seed, log_level, prepare_worker
from fashion_mnist import DEBIAN, read_split
from lightning.pytorch.loggers import CSVLogger
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import track
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import InputNorm, OnlineInputNormMixin, RevisitedBatchNorm
from lightning_revbn.core.table import plain_table
from lightning_revbn.runs.comparison import compare, conclude, table

DATA_SETS = ("digits", "fashion-mnist", "cifar10")
NETWORKS = ("cnn", "resnet18", "resnet34", "resnet50")
SCALES = (1.0, 0.75, 0.5, 0.25, 0.1)
DIVISOR = 100.0
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Settings:
    """What all runs of a grid have in common.

    Attributes:
        data: One of `DATA_SETS`.
        data_dir: Where its files are.
        train_images: Images for training and validation together; None takes all.
        network: One of `NETWORKS`.
        epochs: How long to train.
        batch_size: Images a batch.
        accelerator: Of the Trainer.
    """

    data: str
    data_dir: str
    train_images: int | None
    network: str
    epochs: int
    batch_size: int
    accelerator: str


@dataclass(frozen=True)
class Run:
    """One network to train.

    Attributes:
        settings: What it shares with all others.
        scale: Where batch norm scales start; None is the baseline, without the callback.
        input_norm: Whether the input is normalised online.
        seed: The number of the pair that it belongs to, from 1.
    """

    settings: Settings
    scale: float | None
    input_norm: bool
    seed: int

    @property
    def arm(self) -> str:
        """The name of the arm in tables and directories."""
        name = "baseline" if self.scale is None else f"scale_{self.scale:g}"
        return f"input_{name}" if self.input_norm else name

    def callbacks(self) -> list[L.Callback]:
        """Return what the Trainer gets beside the network: nothing, or the callback."""
        if self.scale is None:
            return []
        return [RevisitedBatchNorm(scale=self.scale, scale_lr_divisor=DIVISOR)]  # at scale 1, the divisor alone


class CifarResNet(PaperRecipe):
    """A ResNet of torchvision whose stem is made for images of some 32x32 pixels: a 3x3 convolution, no pooling.

    Args:
        name: Such as "resnet18".
        channels: Channels of the images.
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.network = torchvision.models.get_model(name, num_classes=10)
        self.network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.network.maxpool = nn.Identity()
        self.initialize()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(images)


class Images(L.LightningDataModule):
    """Images in memory, `(N, C, H, W)`; bytes are divided by 255 on the device.

    Args:
        splits: Images and labels for training, validation and test.
        batch_size: Images a batch.
        seed: Decides the order of the training batches.
        flip: Whether half of the training images are mirrored.
    """

    def __init__(self, splits: Sequence[tuple[Tensor, Tensor]], batch_size: int, seed: int, flip: bool = False) -> None:
        super().__init__()
        self.train, self.val, self.test = (TensorDataset(*split) for split in splits)
        self.batch_size = batch_size
        self.flip = flip
        self.order = torch.Generator().manual_seed(seed)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training images in an order of every epoch's own."""
        return DataLoader(self.train, self.batch_size, shuffle=True, generator=self.order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation images."""
        return DataLoader(self.val, 500)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test images."""
        return DataLoader(self.test, 500)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mirror training images."""
        images, labels = batch
        if self.flip and self.trainer.training:
            mirrored = torch.rand(len(images)) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images, labels

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Bring bytes to [0, 1]."""
        images, labels = batch
        return (images / 255 if images.dtype == torch.uint8 else images), labels


class RawImages(Images):
    """The same, as they are."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Leave bytes to who normalises them."""
        return batch


class NormalizedImages(OnlineInputNormMixin, RawImages):
    """The same, with the paper's input normalisation."""


def load(settings: Settings) -> list[tuple[Tensor, Tensor]]:
    """Return images and labels for training, validation and test.

    A tenth of the development images is for validation, stratified and the same for every seed, as in the paper.

    Args:
        settings: Which data, and how many.

    Returns:
        Three pairs of images `(N, C, H, W)` and labels `(N,)`.
    """
    if settings.data == "digits":
        digits = Digits()
        digits.setup("fit")
        return [tuple(part.tensors) for part in (digits.train_set, digits.val_set, digits.test_set)]
    if settings.data == "fashion-mnist":
        (images, labels), test = (read_split(Path(settings.data_dir), split) for split in ("train", "t10k"))
    else:
        parts = [torchvision.datasets.CIFAR10(settings.data_dir, train=train) for train in (True, False)]
        (images, labels), test = (
            (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts
        )
    chosen = list(range(len(images)))
    if settings.train_images is not None and settings.train_images < len(images):
        chosen, _ = train_test_split(chosen, train_size=settings.train_images, stratify=labels, random_state=0)
    train, val = train_test_split(chosen, test_size=0.1, stratify=labels[chosen], random_state=0)
    return [(images[train], labels[train]), (images[val], labels[val]), test]


def train(run: Run, directory: Path) -> dict[str, Any]:
    """Train one network, test it, and write its result.

    Args:
        run: Which one.
        directory: Its own; what an unfinished run left there is deleted.

    Returns:
        The result.
    """
    began = time.monotonic()
    shutil.rmtree(directory, ignore_errors=True)
    settings, splits = run.settings, load(run.settings)
    channels = splits[0][0].shape[1]
    L.seed_everything(derive_seed(run.seed), verbose=False)
    network = DigitsResNet() if settings.network == "cnn" else CifarResNet(settings.network, channels)
    options: dict[str, Any] = {
        "splits": splits,
        "batch_size": settings.batch_size,
        "seed": derive_seed(run.seed),
        "flip": settings.data == "cifar10",
    }
    data = NormalizedImages(input_norm=InputNorm(channels), **options) if run.input_norm else Images(**options)
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        max_epochs=settings.epochs,
        callbacks=run.callbacks(),
        logger=CSVLogger(directory, name="", version=""),
        log_every_n_steps=len(data.train_dataloader()),
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with log_level(logging.WARNING):
        trainer.fit(network, data)
        val_acc = trainer.callback_metrics["val_acc"].item()
        (metrics,) = trainer.test(network, data, verbose=False)
    # Lightning's metrics are float32: back to a whole number of images, so that equal differences come out equal.
    result = {**asdict(run), "arm": run.arm, "seconds": round(time.monotonic() - began, 1)}
    for name, accuracy, part in (("val_acc", val_acc, splits[1]), ("test_acc", metrics["test_acc"], splits[2])):
        result[name] = 100 * round(accuracy * len(part[1])) / len(part[1])
    write_whole(directory / "result.json", json.dumps(result, indent=2))
    return result


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there completely or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def finished(run: Run, directory: Path) -> dict[str, Any] | None:
    """Return the result of a run that is finished.

    Args:
        run: Which one.
        directory: Its own.

    Returns:
        The result, or None.

    Raises:
        ValueError: If the directory holds a run with other settings.
    """
    file = directory / "result.json"
    if not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    ours = asdict(run)
    different = [name for name in ours["settings"] if ours["settings"][name] != result["settings"].get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"{file} was made with {name}={result['settings'].get(name)!r}, and now it is {ours['settings'][name]!r}: "
            "give every grid an --output-dir of its own"
        )
    return result


def train_missing(runs: Sequence[Run], output: Path, workers: int, console: Console) -> list[dict[str, Any]]:
    """Train every run that is not finished yet, several at a time, with one progress bar over all.

    Args:
        runs: The grid.
        output: Directory of all runs.
        workers: How many processes.
        console: Where the progress is shown.

    Returns:
        The results in the order of the runs.
    """
    places = {run: output / run.arm / f"seed_{run.seed:02}" for run in runs}
    results = {run: result for run in runs if (result := finished(run, places[run])) is not None}
    missing = [run for run in runs if run not in results]
    if results:
        console.print(f"{len(results)} of {len(runs)} runs are finished already")
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=prepare_worker)
    try:
        futures = {pool.submit(train, run, places[run]): run for run in missing}
        for future in track(as_completed(futures), "Training", total=len(futures), console=console):
            results[futures[future]] = future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return [results[run] for run in runs]


def write_results(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one row a run; the same file however often the grid was interrupted."""
    rows = [
        {
            **{name: value for name, value in result["settings"].items() if name not in ("data_dir", "accelerator")},
            **{name: result[name] for name in ("arm", "input_norm", "scale", "seed", "val_acc", "test_acc")},
        }
        for result in results
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def report(results: Sequence[dict[str, Any]], console: Console) -> None:
    """Print every arm against its baseline, and which scale validation data would have chosen.

    Args:
        results: Of the whole grid.
        console: Where to.
    """
    for input_norm in sorted({result["input_norm"] for result in results}):
        arms = [result for result in results if result["input_norm"] == input_norm]
        report_arms(arms, "with input normalisation" if input_norm else "without input normalisation", console)
        console.print(f"Chosen on validation data: {choose(arms)}", soft_wrap=True)


def choose(results: Sequence[dict[str, Any]]) -> str:
    """Return the arm beside the baseline that does best on validation data; the first of several."""
    validation = by_arm(results, "val_acc")
    return max(list(validation)[1:], key=lambda arm: statistics.fmean(validation[arm].values()))


def by_arm(results: Sequence[dict[str, Any]], metric: str) -> dict[str, dict[int, float]]:
    """Return the values of a metric by arm and seed, the baseline first."""
    arms: dict[str, dict[int, float]] = {}
    for result in results:
        arms.setdefault(result["arm"], {})[result["seed"]] = result[metric]
    return arms


def report_arms(results: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    """Print a baseline and the arms that are compared with it.

    Args:
        results: Of these arms, the baseline first.
        title: What the table is about.
        console: Where to.
    """
    baseline, *arms = by_arm(results, "test_acc").items()
    if len(baseline[1]) < 2:
        console.print(f"{title}: one pair tells nothing about chance, take more seeds.")
        return
    comparisons = compare(baseline[1], dict(arms), "greater")
    header, rows = table(comparisons)
    header.insert(2, "Validation")
    for row, scores in zip(rows, by_arm(results, "val_acc").values(), strict=True):
        row.insert(2, f"{statistics.fmean(scores.values()):.5g}")
    text = plain_table(header, rows, f"Accuracy in %, {title}")
    for line in (*text.splitlines(), *conclude(comparisons, SIGNIFICANT)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def draw_curves(results: Sequence[dict[str, Any]], output: Path) -> Path:
    """Draw the validation error of every arm over the epochs, mean over seeds: a panel for each kind of input.

    Args:
        results: Of the whole grid.
        output: Directory of all runs.

    Returns:
        The picture.
    """
    kinds = sorted({result["input_norm"] for result in results})
    figure = Figure(figsize=(1 + 4.4 * len(kinds), 3.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, input_norm in zip(panels, kinds, strict=True):
        curves: dict[float | None, list[list[float]]] = {}
        for result in results:
            if result["input_norm"] == input_norm:
                log = output / result["arm"] / f"seed_{result['seed']:02}" / "metrics.csv"
                curves.setdefault(result["scale"], []).append(read_errors(log))
        for index, (scale, errors) in enumerate(curves.items()):
            means = [statistics.fmean(epoch) for epoch in zip(*errors, strict=True)]
            colour = "black" if scale is None else colormaps["plasma"](0.9 * (index - 1) / max(len(curves) - 2, 1))
            label = "baseline" if scale is None else f"scale {scale:g}"
            panel.plot(range(1, len(means) + 1), means, label=label, color=colour, linewidth=1.3)
        panel.set_title(f"{'With' if input_norm else 'Without'} input normalisation", fontsize="medium")
        panel.set_xlabel("Epoch")
        panel.set_yscale("log")  # the slow start and the end are both seen
        panel.spines[["top", "right"]].set_visible(False)
        panel.minorticks_off()
    limits = panels[0].get_ylim()  # shared by all
    panels[0].set_yticks((ticks := (1, 2, 3, 5, 10, 20, 30, 40, 60, 80)), [str(tick) for tick in ticks])
    panels[0].set_ylim(limits)
    panels[0].set_ylabel("Validation error (%), mean over seeds")
    panels[-1].legend(frameon=False)
    path, picture = output / "curves.png", BytesIO()
    figure.savefig(picture, dpi=110)
    Image.open(picture).convert("RGB").quantize(48).save(path, optimize=True)
    return path


def read_errors(log: Path) -> list[float]:
    """Return the validation error of every epoch in %, from the file of a CSVLogger."""
    with log.open(newline="") as file:
        return [100 - 100 * float(row["val_acc"]) for row in csv.DictReader(file) if row.get("val_acc")]


def add_run_options(parser: argparse.ArgumentParser, output_dir: Path) -> None:
    """Add what every grid of runs has."""
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="epochs of a run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="of a batch (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=15, metavar="N", help="pairs to train (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)"
    )
    parser.add_argument("--accelerator", default="cpu", help="of the Trainer (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=output_dir, metavar="DIR", help="(default: %(default)s)")


def check_run_options(parser: argparse.ArgumentParser, settings: argparse.Namespace) -> None:
    """End the program with one line where a number of these is wrong."""
    for option in ("epochs", "batch_size", "seeds", "workers"):
        if getattr(settings, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1, got {getattr(settings, option)}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's settings; end the program with one line where a value is wrong."""
    parser = argparse.ArgumentParser(description="Trains a baseline and a grid of scales over paired seeds.")
    parser.add_argument("data", choices=DATA_SETS, help="the data set")
    parser.add_argument("--data-dir", type=Path, default=DEBIAN, metavar="DIR", help="its files (default: %(default)s)")
    parser.add_argument("--train-images", type=int, metavar="N", help="images to learn from, a tenth to validate")
    parser.add_argument("--network", choices=NETWORKS, default="cnn", help="cnn is that of the demo, for grey images")
    parser.add_argument(
        "--scales", type=float, nargs="+", default=SCALES, metavar="G", help="the grid; 1 is the divisor alone"
    )
    parser.add_argument(
        "--input-norm", choices=("without", "with", "both"), default="without", help="the input (default: %(default)s)"
    )
    add_run_options(parser, Path("protocol_output"))
    settings = parser.parse_args(arguments)
    check_run_options(parser, settings)
    if settings.data == "digits" and settings.train_images is not None:
        parser.error("--train-images is for fashion-mnist and cifar10")
    if settings.data == "cifar10" and settings.network == "cnn":
        parser.error("--network cnn is for grey images: cifar10 takes a resnet")
    return settings


def grid(arguments: argparse.Namespace) -> list[Run]:
    """Return all runs, seed by seed, so that an interrupted grid has whole pairs."""
    shared = Settings(
        data=arguments.data,
        data_dir=str(arguments.data_dir),
        train_images=arguments.train_images,
        network=arguments.network,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        accelerator=arguments.accelerator,
    )
    inputs = {"without": [False], "with": [True], "both": [False, True]}[arguments.input_norm]
    first = Run(shared, scale=None, input_norm=False, seed=1)
    return [
        replace(first, seed=seed, input_norm=input_norm, scale=scale)
        for seed in range(1, arguments.seeds + 1)
        for input_norm in inputs
        for scale in (None, *arguments.scales)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, write one CSV, and print what it says."""
    parsed = parse_arguments(arguments)
    console = Console()
    try:
        results = train_missing(grid(parsed), parsed.output_dir, parsed.workers, console)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f"paper_protocol.py: {error}")
    write_results(results, parsed.output_dir / "results.csv")
    report(results, console)
    picture = draw_curves(results, parsed.output_dir)
    console.print(f"Runs: {parsed.output_dir / 'results.csv'}, learning curves: {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
