"""Finds the logs that Lightning's loggers for CSV, TensorBoard, W&B and MLflow wrote, and reads every scalar."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lightning_revbn.runs.csv_file import CSV_NAME, read_csv
from lightning_revbn.runs.event_files import first_steps, read_events
from lightning_revbn.runs.mlflow_stores import (
    MlflowRun,
    find_in_database,
    is_database,
    is_run_directory,
    read_mlflow,
)
from lightning_revbn.runs.names import natural, one_line
from lightning_revbn.runs.scalars import Advance, LogError, Scalars
from lightning_revbn.runs.wandb_files import WANDB_SUFFIX, read_wandb

__all__ = ["Log", "find_logs", "read_scalars"]

_EVENTS_MARK = "tfevents"  # in the name of every event file; TensorBoard finds the files by it
_DATABASES = (".db", ".sqlite", ".sqlite3")


@dataclass(frozen=True)
class Log:
    """The files of a run.

    Args:
        path: The run's directory; the file itself, if the user named a CSV file not called metrics.csv; for MLflow,
            the SQLite file and the run's name.
        csv: The file of the run's CSVLogger.
        events: The files of the run's TensorBoardLogger, oldest first: a resumed run begins a new file.
        named: Whether the user named this run, not a directory above it.
        wandb: The file of the run's offline WandbLogger.
        mlflow: The run in the local store of its MLFlowLogger.
    """

    path: Path
    csv: Path | None = None
    events: tuple[Path, ...] = ()
    named: bool = True
    wandb: Path | None = None
    mlflow: MlflowRun | None = None

    @property
    def size(self) -> int:
        """The largest number of bytes to read; 0 for MLflow's stores, whose size is unknown."""
        return sum(file.stat().st_size for file in (self.csv, self.wandb, *self.events) if file is not None)


def find_logs(paths: Iterable[Path]) -> list[Log]:
    """Find the runs that paths name.

    Args:
        paths: Each a metrics.csv, an event file, a `.wandb` file, a SQLite file of MLflow, the directory of a run, or a
            directory above several runs. Everything below the directory of a run belongs to that run.

    Returns:
        The runs in the order of the paths, each once; runs below a directory in natural order (2 before 10).

    Raises:
        LogError: If a path does not exist or holds no log.
    """
    found: dict[Path, Log] = {}
    for path in paths:
        try:
            logs = list(_logs_of(path))
        except OSError as error:
            raise LogError(f"{one_line(path)} cannot be read: {error.strerror}") from error
        if not logs:
            raise LogError(
                f"{one_line(path)} holds no log, and its subdirectories hold none: no {CSV_NAME} of CSVLogger, event "
                "file of TensorBoardLogger, offline run of W&B or local store of MLflow"
            )
        for log in logs:
            key = log.path.resolve()
            found[key] = _joined_log(found[key], log) if key in found else log
    return list(found.values())


def read_scalars(log: Log, advance: Advance = lambda size: None) -> Scalars:
    """Read every scalar that was logged in a run.

    If a run has a metrics.csv and event files, the values come from metrics.csv and the order from the event files.
    If the event files begin earlier, the values come from them too: CSVLogger deletes its file when a run is resumed.

    Args:
        log: The run.
        advance: Called with the number of bytes after every read.

    Returns:
        The scalars. If a step was logged twice, the last value counts.

    Raises:
        LogError: If no file can be read.
    """
    try:
        if log.mlflow is not None:
            return read_mlflow(log.mlflow, log.path, advance)
        if log.wandb is not None:
            return read_wandb(log.wandb, advance)
        if log.csv is None:
            return read_events(log.path, log.events, advance)
        if not log.events:
            return read_csv(log.csv, advance)
        return _read_both(log, log.csv, advance)
    except OSError as error:
        raise LogError(f"{one_line(error.filename or log.path)} cannot be read: {error.strerror or error}") from error


def _logs_of(path: Path) -> Iterator[Log]:
    if path.is_file():
        yield from _named_file(path)
    elif path.is_dir():
        for directory, below, files in os.walk(path):
            here = Path(directory)
            log = _in_directory(here, [*files, *below], named=here == path)
            # MLflow moves deleted experiments to `.trash`.
            below[:] = [] if log else sorted((name for name in below if name != ".trash"), key=natural)
            if log:
                yield log
            for name in sorted(files, key=natural):
                if name.endswith(_DATABASES) and is_database(here / name):
                    yield from _in_database(here / name, named=False)
    else:
        raise LogError(f"{one_line(path)} does not exist")


def _named_file(path: Path) -> Iterator[Log]:
    if _EVENTS_MARK in path.name:
        yield Log(path.parent, events=(path,))
    elif path.suffix == WANDB_SUFFIX:
        yield Log(path.parent, wandb=path)
    elif is_database(path):
        yield from _in_database(path, named=True)
    elif path.name != CSV_NAME:
        yield Log(path, csv=path)
    else:
        # Event files beside it hold the order of the keys, and steps before a resume.
        beside = _in_directory(path.parent, [file.name for file in path.parent.iterdir()], named=True)
        yield beside or Log(path.parent, csv=path)


def _in_database(path: Path, named: bool) -> Iterator[Log]:
    for name, run in find_in_database(path):
        yield Log(path / name, named=named, mlflow=run)


def _in_directory(directory: Path, names: Collection[str], named: bool) -> Log | None:
    events = sorted((name for name in names if _EVENTS_MARK in name), key=natural)
    files = [directory / name for name in events if (directory / name).is_file()]
    table = directory / CSV_NAME if CSV_NAME in names and (directory / CSV_NAME).is_file() else None
    # A process that logged nothing, or was killed, leaves empty files.
    filled = [file for file in files if file.stat().st_size] or ([] if table else files[:1])
    if table or filled:
        return Log(directory, table, tuple(filled), named)
    offline = sorted(name for name in names if name.endswith(WANDB_SUFFIX) and (directory / name).is_file())
    if offline:
        return Log(directory, named=named, wandb=directory / offline[0])
    if is_run_directory(directory, names):
        return Log(directory, named=named, mlflow=MlflowRun(directory.parent.parent, directory.name))
    return None


def _joined_log(one: Log, other: Log) -> Log:
    events = {file.resolve(): file for file in (*other.events, *one.events)}
    ordered = sorted(events.values(), key=lambda file: natural(file.name))  # event files are named by their time
    named = one.named or other.named
    return Log(one.path, one.csv or other.csv, tuple(ordered), named, one.wandb or other.wandb, one.mlflow)


def _read_both(log: Log, table: Path, advance: Advance) -> Scalars:
    try:
        scalars = read_csv(table, advance)
    except LogError as error:
        other = read_events(log.path, log.events, advance)
        return Scalars(other.series, other.in_order, (f"{error}; read the event files instead", *other.warnings))
    if find_spec("tensorboard") is None:  # metrics.csv has every value, only the order is unknown
        return scalars
    first = first_steps(log.events, scalars.series, advance)
    if any(step < scalars.series[key].steps[0] for key, step in first.items()):
        return read_events(log.path, log.events, advance)
    order = [*first, *(key for key in scalars.series if key not in first)]
    return Scalars({key: scalars.series[key] for key in order}, frozenset(first), scalars.warnings)
