"""Reads MLflow's local stores, a SQLite file or a directory `mlruns`, through MLflow's own client."""

from __future__ import annotations

import functools
import os
import sqlite3
from collections.abc import Collection, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_revbn.runs.names import natural, one_line
from lightning_revbn.runs.scalars import Advance, Columns, LogError, Scalars

__all__ = ["MlflowRun", "find_in_database", "is_database", "is_run_directory", "read_mlflow", "read_mlflow_settings"]

_SQLITE = b"SQLite format 3\0"
_TABLES = {"experiments", "runs", "metrics", "params"}
_SWITCH = "MLFLOW_ALLOW_FILE_STORE"
"""Without this variable MLflow 3 refuses to write or read a store of directories."""


@dataclass(frozen=True)
class MlflowRun:
    """A run of a local store.

    Args:
        store: The SQLite file, or the directory `mlruns`.
        run_id: The id of the run.
    """

    store: Path
    run_id: str

    @property
    def uri(self) -> str:
        """The address by which MLflow opens the store."""
        return f"sqlite:///{self.store.absolute()}" if self.store.is_file() else self.store.absolute().as_uri()


def is_database(path: Path) -> bool:
    """Tell whether a file is a SQLite file of MLflow.

    Args:
        path: Any file.

    Returns:
        Whether the file holds MLflow's tables. MLflow is not used here: it would create missing tables.
    """
    with path.open("rb") as file:
        if file.read(len(_SQLITE)) != _SQLITE:
            return False
    try:
        with _connected(path) as connection:
            return {str(name) for (name,) in connection.execute("select name from sqlite_master")} >= _TABLES
    except (sqlite3.Error, UnicodeDecodeError):  # SQLite's errors quote bytes of a damaged file
        return False


def find_in_database(path: Path) -> list[tuple[str, MlflowRun]]:
    """List the runs of a SQLite file, without deleted runs.

    Args:
        path: A file that `is_database`.

    Returns:
        Unique names with their runs, in natural order of the names, then of the start.

    Raises:
        LogError: If the file cannot be read.
    """
    # Plain SQL avoids the import of MLflow, which takes ten seconds on a busy machine, until a run is read.
    query = "select run_uuid, name from runs where lifecycle_stage = 'active' order by start_time, run_uuid"
    try:
        with _connected(path) as connection:
            rows = [(str(run_id), str(name or run_id)) for run_id, name in connection.execute(query)]
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise LogError(f"{one_line(path)} cannot be read: {one_line(error)}") from error
    names = [name for _, name in rows]
    named = [(name if names.count(name) == 1 else f"{name}-{run_id[:8]}", run_id) for run_id, name in rows]
    return [
        (name.replace("/", "_"), MlflowRun(path, run_id))  # the name becomes the end of the run's path
        for name, run_id in sorted(named, key=lambda row: natural(row[0]))
    ]


def is_run_directory(directory: Path, names: Collection[str]) -> bool:
    """Tell whether a directory is a run of a store of directories.

    Args:
        directory: The directory.
        names: Names of the files and directories in it.

    Returns:
        Whether the directory is a run that was not deleted.
    """
    if not {"meta.yaml", "metrics", "params"} <= {*names}:
        return False
    with (directory / "meta.yaml").open(errors="replace") as file:
        return "lifecycle_stage: deleted" not in file.read(100_000)


def read_mlflow(run: MlflowRun, path: Path, advance: Advance) -> Scalars:
    """Read every scalar of a run.

    Args:
        run: The run.
        path: The path that errors name.
        advance: Called after the last read, with 0: the size of the store is unknown.

    Returns:
        The scalars, sorted by name: the store does not keep an order.

    Raises:
        LogError: If the run has no values, or MLflow is missing or cannot read the run.
    """
    columns = Columns()
    with _client(run, path) as client:
        for key in sorted(client.get_run(run.run_id).data.metrics, key=natural):
            for metric in client.get_metric_history(run.run_id, key):
                columns.add(key, int(metric.step), float(metric.value))
    advance(0)
    series = columns.series()
    if not series:
        raise LogError(f"{one_line(path)} holds no values")
    return Scalars(series)


def read_mlflow_settings(run: MlflowRun, path: Path) -> dict[str, Any]:
    """Read the parameters of a run.

    Args:
        run: The run.
        path: The path that errors name.

    Returns:
        Texts by key, as MLflow keeps them.

    Raises:
        LogError: If MLflow is missing or cannot read the run.
    """
    with _client(run, path) as client:
        return dict(client.get_run(run.run_id).data.params)


@contextmanager
def _connected(path: Path) -> Generator[sqlite3.Connection, None, None]:
    # Read-only: a run may still write to the store.
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")  # for damaged files
        yield connection


@contextmanager
def _client(run: MlflowRun, path: Path) -> Generator[Any, None, None]:
    """Open MLflow's client for a store, and turn MLflow's errors into a LogError.

    Yields:
        The client.

    Raises:
        LogError: If MLflow is missing, or fails.
    """
    try:
        tracking = import_module("mlflow.tracking")
        if run.store.is_file():  # mlflow-skinny comes without the packages for SQLite
            import_module("sqlalchemy")
            import_module("alembic")
    except ImportError as error:
        raise LogError(
            f"{one_line(path)} needs MLflow to be read: pip install mlflow-skinny sqlalchemy alembic"
        ) from error
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "true"
    try:
        yield tracking.MlflowClient(tracking_uri=run.uri)
    except Exception as error:  # on a damaged store, MLflow passes on any error of its dependencies
        raise LogError(f"{one_line(path)} cannot be read by MLflow: {one_line(error)}") from error
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
