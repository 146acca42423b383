"""Writes logs as Lightning's loggers do, without a run, and reads the logs of runs."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from lightning_revbn.runs.logs import find_logs, read_scalars
from lightning_revbn.runs.scalars import LogError, Scalars

Events = Iterable[tuple[int, Mapping[str, float]]]
"""Steps with the metrics that are logged at each step."""

COUNTING = [(step, {"b": float(step), "a": -float(step)}) for step in range(6)]


def write_csv(directory: Path, events: Events) -> Path:
    """Write a `metrics.csv` as CSVLogger does, and return its path."""
    logger = CSVLogger(directory / "new", name="", version="")  # CSVLogger warns of directories that hold other files
    for step, metrics in events:
        logger.log_metrics(dict(metrics), step=step)
    logger.save()
    shutil.move(directory / "new" / "metrics.csv", directory / "metrics.csv")
    shutil.rmtree(directory / "new")  # older versions of Lightning write hparams.yaml too
    return directory / "metrics.csv"


def write_events(directory: Path, events: Events) -> Path:
    """Write an event file of TensorBoard, and return its path."""
    # TensorBoard takes a second to import, and most users of this module do not need it.
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory)) as writer:
        for step, metrics in events:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)
    return max(directory.glob("*tfevents*"), key=lambda path: path.name)


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of the only `metrics.csv` below a directory, without empty cells."""
    (file,) = path.rglob("metrics.csv")
    with file.open() as lines:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(lines)]


def logged_in(path: Path) -> list[dict[str, str]]:
    """Return the rows that the monitor has logged, from the only `metrics.csv` below a directory."""
    return [row for row in rows(path) if "revbn/scale_mean" in row]


def read(path: Path) -> Scalars:
    (log,) = find_logs([path])
    return read_scalars(log)


def read_or_error(path: Path) -> Scalars | str:
    """Return the scalars of a log, or the error's line if the log cannot be read."""
    try:
        return read(path)
    except LogError as error:
        return str(error)


def points(scalars: Scalars) -> dict[str, dict[int, float]]:
    return {
        key: dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
        for key, series in scalars.series.items()
    }


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path
