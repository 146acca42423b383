"""Reads the local stores of MLflow: a SQLite file, or a directory `mlruns`, by MLflow's own client."""

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
"""MLflow 3 refuses directories without it, for reading too."""


@dataclass(frozen=True)
class MlflowRun:
    """A run of a local store.

    Args:
        store: The SQLite file, or the directory `mlruns`.
        run_id: The run's.
    """

    store: Path
    run_id: str

    @property
    def uri(self) -> str:
        """How MLflow names the store."""
        return f"sqlite:///{self.store.absolute()}" if self.store.is_file() else self.store.absolute().as_uri()


def is_database(path: Path) -> bool:
    """Tell whether a file is a SQLite file of MLflow.

    Args:
        path: Any file.

    Returns:
        Whether MLflow's tables are in it; looked up without MLflow, which would make those that are missing.
    """
    with path.open("rb") as file:
        if file.read(len(_SQLITE)) != _SQLITE:
            return False
    try:
        with _connected(path) as connection:
            return {str(name) for (name,) in connection.execute("select name from sqlite_master")} >= _TABLES
    except (sqlite3.Error, UnicodeDecodeError):  # SQLite quotes a damaged file in its errors
        return False


def find_in_database(path: Path) -> list[tuple[str, MlflowRun]]:
    """List the runs of a SQLite file, but for those that were deleted.

    Args:
        path: A file that `is_database`.

    Returns:
        Names, each once, and runs; in natural order of the names, then of the start.

    Raises:
        LogError: If the file cannot be read.
    """
    # MLflow takes ten seconds to import on a busy machine, and is needed only for runs that are read.
    query = "select run_uuid, name from runs where lifecycle_stage = 'active' order by start_time, run_uuid"
    try:
        with _connected(path) as connection:
            rows = [(str(run_id), str(name or run_id)) for run_id, name in connection.execute(query)]
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise LogError(f"{one_line(path)} cannot be read: {one_line(error)}") from error
    names = [name for _, name in rows]
    named = [(name if names.count(name) == 1 else f"{name}-{run_id[:8]}", run_id) for run_id, name in rows]
    return [
        (name.replace("/", "_"), MlflowRun(path, run_id))
        for name, run_id in sorted(named, key=lambda row: natural(row[0]))
    ]


def is_run_directory(directory: Path, names: Collection[str]) -> bool:
    """Tell whether a directory is a run of a store of directories.

    Args:
        directory: The directory.
        names: What is in it.

    Returns:
        Whether it is, and the run was not deleted.
    """
    if not {"meta.yaml", "metrics", "params"} <= {*names}:
        return False
    with (directory / "meta.yaml").open(errors="replace") as file:
        return "lifecycle_stage: deleted" not in file.read(100_000)


def read_mlflow(run: MlflowRun, path: Path, advance: Advance) -> Scalars:
    """Read every scalar of a run.

    Args:
        run: The run.
        path: How errors name it.
        advance: Called with the number of bytes whenever some were read.

    Returns:
        The scalars, sorted by name: the store does not tell an order.

    Raises:
        LogError: If the run has no values, or MLflow cannot read it or is missing.
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
        path: How errors name it.

    Returns:
        Texts by key, as MLflow keeps them.

    Raises:
        LogError: If MLflow cannot read it or is missing.
    """
    with _client(run, path) as client:
        return dict(client.get_run(run.run_id).data.params)


@contextmanager
def _connected(path: Path) -> Generator[sqlite3.Connection, None, None]:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")  # of a damaged file
        yield connection


@contextmanager
def _client(run: MlflowRun, path: Path) -> Generator[Any, None, None]:
    """Give MLflow's client of a store, and turn its errors into one line.

    Yields:
        The client.

    Raises:
        LogError: If it is missing, or fails.
    """
    try:
        tracking = import_module("mlflow.tracking")
        if run.store.is_file():
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
    except Exception as error:  # of a damaged store MLflow lets errors of every package below it through
        raise LogError(f"{one_line(path)} cannot be read by MLflow: {one_line(error)}") from error
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
