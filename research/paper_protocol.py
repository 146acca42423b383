"""The paper's protocol: a baseline against arms with other settings, over paired seeds.

    python research/paper_protocol.py digits
    python research/paper_protocol.py digits --arms baseline scale=0.1 scale=1,scale_lr_divisor=1,eps=1e-3
    python research/paper_protocol.py fashion-mnist --train-images 5000 --epochs 30 --seeds 8
    python research/paper_protocol.py cifar10 --network resnet18 --data-dir data --epochs 180 --device cuda
    python research/paper_protocol.py fashion-mnist --network resnet18 --epochs 30 --device cuda --minutes 9 --jobs 3 \
        --arms baseline scale=0.1 scale=1,scale_lr_divisor=1,shift_lr_multiplier=10,eps=1e-3

Every run has a directory with its learning curves, `metrics.csv`, and a `result.json`, which is written when the run is
finished. A second call of the same command trains only missing runs. A failed run is named at the end and stops no
other run. `lightning-revbn compare` reads the same curves. With `--minutes`, a call ends
before a run that would take longer, and the next call goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import MISSING, asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import lightning as L
from arms import Arm, parse_arm, reference
from data_sets import DATA_SETS, load, make_data
from digits import derive_seed, log_level, prepare_worker
from fashion_mnist import DEBIAN
from networks import NETWORKS, make_network
from recorder import Recorder
from rich.console import Console
from rich.progress import track

from lightning_revbn.core.table import plain_table
from lightning_revbn.runs.comparison import compare, conclude, table

ARMS = ("baseline", "scale=1", "scale=0.5", "scale=0.25", "scale=0.1")
HEAD_INITS = ("paper", "torch")
OPTIMIZERS = {"sgd": (0.1, 1e-4), "adamw": (1e-3, 1e-2)}
"""Default learning rate and weight decay: the paper's for SGD, torch's for AdamW."""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Settings:
    """The settings that all runs of a grid share.

    Attributes:
        data: One of `DATA_SETS`.
        data_dir: Directory of the data set's files.
        train_images: Samples for training and validation together; None takes all.
        network: One of `NETWORKS`.
        epochs: Number of epochs.
        batch_size: Samples per batch.
        accelerator: Accelerator of the Trainer.
        head_init: Initialisation of the last linear layer: `"paper"` or `"torch"`.
        optimizer: A key of `OPTIMIZERS`.
        learning_rate: Rate at the start of the cosine schedule.
        weight_decay: Decay of the weights of convolutions and linear layers only.
        precision: The precision of the Trainer.
        compile: Whether `torch.compile` compiles the network.
    """

    data: str
    data_dir: str
    train_images: int | None
    network: str
    epochs: int
    batch_size: int
    accelerator: str
    head_init: str
    optimizer: str
    learning_rate: float
    weight_decay: float
    precision: str = "32-true"
    compile: bool = False

    @property
    def holds_data_on_gpu(self) -> bool:
        """Whether all samples are on the GPU, rather than on their way to it batch by batch."""
        return self.accelerator in ("gpu", "cuda")


SETTINGS_SINCE: dict[str, Any] = {
    field.name: field.default for field in fields(Settings) if field.default is not MISSING
}
"""Settings that runs of the past do not have, with what they were."""


@dataclass(frozen=True)
class Run:
    """A network to train.

    Attributes:
        settings: The settings that it shares with all other runs.
        arm: The settings in which it differs from the baseline.
        seed: The number of its pair, from 1.
    """

    settings: Settings
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """The name of the arm in tables and directories."""
        return self.arm.name

    def callbacks(self) -> list[L.Callback]:
        """Return the callbacks of the Trainer."""
        return self.arm.callbacks()


def train(run: Run, directory: Path) -> dict[str, Any]:
    """Train a network, score validation and test data after every epoch, and write curves and result.

    Args:
        run: The network to train.
        directory: Directory of the run; files that an unfinished run left there are deleted.

    Returns:
        The result.
    """
    began = time.monotonic()
    shutil.rmtree(directory, ignore_errors=True)
    settings, recorder = run.settings, Recorder()
    splits = load(settings.data, settings.data_dir, settings.train_images)
    L.seed_everything(derive_seed(run.seed), verbose=False)
    network = make_network(
        settings.network,
        settings.data,
        splits[0][0].shape[1],
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        head_init=settings.head_init,
        optimizer=settings.optimizer,
    )
    if settings.compile:
        network.compile()
    data = make_data(
        splits,
        run.arm.input_norm,
        "cuda" if settings.holds_data_on_gpu else "cpu",
        batch_size=settings.batch_size,
        seed=derive_seed(run.seed),
        flip=settings.data == "cifar10",
    )
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.precision,  # pyright: ignore[reportArgumentType] # one of those that the parser takes
        max_epochs=settings.epochs,
        callbacks=[*run.callbacks(), recorder],
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with log_level(logging.WARNING):
        trainer.fit(network, data)
    # Evaluation does not change the network, so the best epoch's test accuracy belongs to that epoch's weights.
    last, best = recorder.rows[-1], recorder.best()
    result = {
        **asdict(run),
        "name": run.name,
        "seconds": round(time.monotonic() - began, 1),
        "val_acc": 100 * last["val_acc"],
        "test_acc": 100 * last["test_acc"],
        "best_epoch": best["epoch"],
        "best_val_acc": 100 * best["val_acc"],
        "best_test_acc": 100 * best["test_acc"],
    }
    directory.mkdir(parents=True)
    write_whole(directory / "metrics.csv", recorder.as_csv())
    write_whole(directory / "result.json", json.dumps(result, indent=2))  # last: it marks the run as finished
    return result


class OutOfTimeError(Exception):
    """A run would not end in time."""


@dataclass
class TimeLimit:
    """When no run is to be trained any more.

    Attributes:
        end: As `time.time()` tells it, which all processes share.
        left: How many runs were left for another call.
    """

    end: float
    left: int = 0


def train_in_time(run: Run, directory: Path, end: float) -> dict[str, Any]:
    """Train one network, if it will be finished in time, as far as the process knows from its runs before.

    Args:
        run: Which one.
        directory: Its own.
        end: When it must be finished.

    Returns:
        The result.

    Raises:
        OutOfTimeError: If there is no time for it.
    """
    if time.time() + max(_SECONDS, default=0.0) > end:
        raise OutOfTimeError
    result = train(run, directory)
    _SECONDS.append(result["seconds"])
    return result


_SECONDS: list[float] = []
"""How long the runs of this process took."""


def write_whole(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def finished(run: Run, directory: Path) -> dict[str, Any] | None:
    """Return the result of a run that is finished.

    Args:
        run: The run.
        directory: Directory of the run.

    Returns:
        The result, or None.

    Raises:
        ValueError: If the directory holds a run with other settings.
    """
    file = directory / "result.json"
    if not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    # A run that is older than a setting has the default of the setting.
    result["settings"] = {**SETTINGS_SINCE, **result["settings"]}
    ours = json.loads(json.dumps(asdict(run)))  # as JSON has it, with lists for tuples
    different = [name for name in ours["settings"] if ours["settings"][name] != result["settings"].get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"{file} was made with {name}={result['settings'].get(name)!r}, and now it is {ours['settings'][name]!r}: "
            "give every grid an --output-dir of its own"
        )
    return result


def train_missing(
    runs: Sequence[Run], output: Path, jobs: int, console: Console, limit: TimeLimit | None = None
) -> list[dict[str, Any]]:
    """Train every run that is not finished yet, several at a time, with a single progress bar.

    Args:
        runs: The grid.
        output: Directory of all runs.
        jobs: Number of processes; each trains one run after another.
        console: The console that shows the progress and the failed runs.
        limit: The time after which no run begins; None trains all.

    Returns:
        The results in the order of the runs, without failed or postponed runs.
    """
    places = {run: output / run.name / f"seed_{run.seed:02}" for run in runs}
    results = {run: result for run in runs if (result := finished(run, places[run])) is not None}
    missing = [run for run in runs if run not in results]
    if results:
        console.print(f"{len(results)} of {len(runs)} runs are finished already")
    failed: dict[Run, BaseException] = {}
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=prepare_worker)
    try:
        end = math.inf if limit is None else limit.end
        futures: dict[Future[dict[str, Any]], Run] = {
            pool.submit(train_in_time, run, places[run], end): run for run in missing
        }
        for future in track(as_completed(futures), "Training", total=len(futures), console=console):
            error = future.exception()
            if error is None:
                results[futures[future]] = future.result()
            elif isinstance(error, OutOfTimeError):
                assert limit is not None
                limit.left += 1
            else:
                failed[futures[future]] = error
    finally:
        pool.shutdown(cancel_futures=True)
    for run, error in failed.items():
        console.print(f"{places[run]} failed: {type(error).__name__}: {error}", soft_wrap=True, markup=False)
    return [results[run] for run in runs if run in results]


def write_results(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a row per run; interruptions of the grid do not change the file."""
    scores = ("val_acc", "test_acc", "best_epoch", "best_val_acc", "best_test_acc")
    left_out = {"data_dir", "accelerator"}
    left_out |= {
        name
        for name, default in SETTINGS_SINCE.items()
        if all(result["settings"].get(name, default) == default for result in results)
    }
    rows = [
        {
            **{name: value for name, value in result["settings"].items() if name not in left_out},
            "arm": result["name"],
            **{name: result["arm"][name] for name in result["arm"]},
            "seed": result["seed"],
            **{name: f"{result[name]:.7g}" for name in scores},
        }
        for result in results
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def by_arm(results: Sequence[dict[str, Any]], score: str) -> dict[str, dict[int, float]]:
    """Return the scores by name of the arm, for the seeds that all arms share."""
    scores: dict[str, dict[int, float]] = {}
    for result in results:
        scores.setdefault(result["name"], {})[result["seed"]] = result[score]
    shared = set.intersection(*(set(seeds) for seeds in scores.values()))
    return {name: {seed: seeds[seed] for seed in seeds if seed in shared} for name, seeds in scores.items()}


def report(results: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    """Print every arm against its baseline, after the last epoch.

    Args:
        results: Results of the whole grid.
        title: The settings that all runs share.
        console: The console to print to.
    """
    names = {result["name"]: reference(Arm(**result["arm"])).name for result in results}
    found, validation = by_arm(results, "test_acc"), by_arm(results, "val_acc")
    for baseline in dict.fromkeys(names.values()):
        arms = {name: found[name] for name in found if names[name] == baseline != name}
        if baseline not in found or not arms or len(found[baseline]) < 2:
            continue
        comparisons = compare(found[baseline], arms, "greater")
        header, rows = table(comparisons)
        header.insert(2, "Validation")
        for row, name in zip(rows, (baseline, *arms), strict=True):
            row[0] = name
            row.insert(2, f"{statistics.fmean(validation[name].values()):.5g}")
        text = plain_table(header, rows, f"Accuracy in %, {title}")
        for line in (*text.splitlines(), *conclude(comparisons, SIGNIFICANT)):
            console.print(line, soft_wrap=True, markup=False, highlight=False)


def add_run_options(parser: argparse.ArgumentParser, output_dir: Path) -> None:
    """Add the options that every grid of runs has."""
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="epochs of a run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="of a batch (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=15, metavar="N", help="pairs to train (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs side by side (default: one a core)"
    )
    parser.add_argument(
        "--head-init",
        choices=HEAD_INITS,
        default="paper",
        help="how the last linear layer starts: as in the paper's code, or as torch has it (default: %(default)s)",
    )
    parser.add_argument("--accelerator", default="cpu", help="of the Trainer (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=output_dir, metavar="DIR", help="(default: %(default)s)")


def check_run_options(parser: argparse.ArgumentParser, settings: argparse.Namespace) -> None:
    """End the program with a single-line error if a number among these options is wrong."""
    for option in ("epochs", "batch_size", "seeds", "jobs"):
        if getattr(settings, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1, got {getattr(settings, option)}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the settings of the command line; end the program with a single-line error if a value is wrong."""
    parser = argparse.ArgumentParser(description="Trains a baseline and arms with other settings over paired seeds.")
    parser.add_argument("data", choices=DATA_SETS, help="the data set")
    parser.add_argument("--data-dir", type=Path, default=DEBIAN, metavar="DIR", help="its files (default: %(default)s)")
    parser.add_argument("--train-images", type=int, metavar="N", help="samples to learn from, a tenth to validate")
    parser.add_argument("--network", choices=NETWORKS, default="cnn", help="cnn is a small network for the data")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=ARMS,
        metavar="ARM",
        help="settings of an arm, such as scale=0.1,input_norm=batch; its baseline must be among them",
    )
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="sgd", help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, metavar="LR", help="(default: 0.1 for SGD, 0.001 for AdamW)")
    add_run_options(parser, Path("protocol_output"))
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="cuda is --accelerator gpu --precision bf16-mixed; a GPU holds all images",
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="of the Trainer (default: 32-true)")
    parser.add_argument("--compile", action="store_true", help="compile the network")
    parser.add_argument(
        "--minutes", type=float, metavar="N", help="begin no run that would end later (default: no limit)"
    )
    settings = parser.parse_args(arguments)
    check_run_options(parser, settings)
    if settings.device is not None:
        settings.accelerator = "gpu" if settings.device == "cuda" else "cpu"
    if settings.precision is None:
        settings.precision = "bf16-mixed" if settings.device == "cuda" else "32-true"
    if settings.data in ("digits", "mnist1d") and settings.train_images is not None:
        parser.error("--train-images is for fashion-mnist and cifar10")
    if settings.data == "cifar10" and settings.network == "cnn":
        parser.error("--network cnn is for grey images: cifar10 takes a resnet")
    if settings.data == "mnist1d" and settings.network != "cnn":
        parser.error("--network resnet is for images: mnist1d takes cnn")
    try:
        settings.arms = list(dict.fromkeys(map(parse_arm, settings.arms)))
    except ValueError as error:
        parser.error(str(error))
    missing = [arm.name for arm in settings.arms if reference(arm) not in settings.arms]
    if missing:
        parser.error(f"--arms has no baseline for {', '.join(missing)}")
    return settings


def grid(arguments: argparse.Namespace) -> list[Run]:
    """Return all runs, seed by seed, so that an interrupted grid has whole pairs."""
    rate, decay = OPTIMIZERS[arguments.optimizer]
    shared = Settings(
        data=arguments.data,
        data_dir=str(arguments.data_dir),
        train_images=arguments.train_images,
        network=arguments.network,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        accelerator=arguments.accelerator,
        head_init=arguments.head_init,
        optimizer=arguments.optimizer,
        learning_rate=rate if arguments.learning_rate is None else arguments.learning_rate,
        weight_decay=decay,
        precision=arguments.precision,
        compile=arguments.compile,
    )
    return [Run(shared, arm, seed) for seed in range(1, arguments.seeds + 1) for arm in arguments.arms]


def finish(
    runs: Sequence[Run], results: Sequence[dict[str, Any]], output: Path, title: str, console: Console, left: int = 0
) -> None:
    """Write the CSV of a grid and print the comparisons; end the program with an error if runs are missing.

    Args:
        runs: The grid.
        results: Results of the runs that did not fail.
        output: Directory of all runs.
        title: The settings that all runs share.
        console: The console to print to.
        left: Number of runs that are left for another call.
    """
    if results:
        write_results(results, output / "results.csv")
        report(results, title, console)
        console.print(f"Runs: {output / 'results.csv'}", soft_wrap=True)
    if left:
        console.print(f"{left} of {len(runs)} runs are left: the same command trains them")
    failed = len(runs) - len(results) - left
    if failed:
        sys.exit(f"{failed} of {len(runs)} runs failed")


def main(arguments: list[str] | None = None) -> None:
    """Train the missing runs, write their results as CSV, and print the comparisons."""
    parsed = parse_arguments(arguments)
    console, runs = Console(), grid(parsed)
    limit = None if parsed.minutes is None else TimeLimit(time.time() + 60 * parsed.minutes)
    try:
        results = train_missing(runs, parsed.output_dir, parsed.jobs, console, limit)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"paper_protocol.py: {error}")
    finish(
        runs, results, parsed.output_dir, f"{parsed.data}, {parsed.epochs} epochs", console, limit.left if limit else 0
    )


if __name__ == "__main__":
    main()
