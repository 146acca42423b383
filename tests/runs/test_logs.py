from __future__ import annotations

import math
import random
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.lit import LitNet, loader, trainer
from helpers.logs import COUNTING, points, read, read_or_error, text, write_csv, write_events
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_revbn import BatchNormMonitor
from lightning_revbn.runs.logs import Log, find_logs, read_scalars
from lightning_revbn.runs.scalars import LogError


class Recorder(DummyLogger):
    """Remembers what loggers are given."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        for key, value in metrics.items():
            self.values.setdefault(key, {})[step] = float(value)


@pytest.mark.parametrize("kind", ["csv", "events", "both"])
def test_all_scalars_of_a_real_run_are_read_back(kind: str, tmp_path: Path) -> None:
    recorder = Recorder()
    loggers: list[Any] = [recorder]
    if kind != "events":
        loggers.append(CSVLogger(tmp_path / "run", name="", version=""))
    if kind != "csv":
        loggers.append(TensorBoardLogger(tmp_path / "run", name="", version="", default_hp_metric=False))
    monitor = BatchNormMonitor(every_n_steps=1, activations=True)
    trainer(tmp_path, monitor, logger=loggers).fit(LitNet(), loader(3))
    found = points(read(tmp_path / "run"))
    expected = recorder.values
    if kind == "events":  # which hold 32 bits
        expected = {key: {s: float(np.float32(v)) for s, v in own.items()} for key, own in expected.items()}
    assert found == expected
    assert found["revbn/model.bn1/normalized_absmax"].keys() == set(range(6))


@pytest.mark.parametrize("write", [write_csv, write_events])
def test_the_last_value_of_a_step_counts_and_steps_are_sorted(write: Any, tmp_path: Path) -> None:
    write(tmp_path, [(5, {"a": 1.0}), (3, {"a": 2.0}), (5, {"a": 3.0}), (4, {"a": math.nan}), (6, {"a": -math.inf})])
    series = read(tmp_path).series["a"]
    assert series.steps.tolist() == [3, 4, 5, 6]
    assert np.array_equal(series.values, [2.0, math.nan, 3.0, -math.inf], equal_nan=True)


def test_steps_that_no_run_can_reach_are_left_out(tmp_path: Path) -> None:
    write_events(tmp_path, [(2**60, {"a": 1.0}), (2**53, {"a": 2.0})])
    assert points(read(tmp_path)) == {"a": {2**53: 2.0}}


def test_values_are_those_of_the_csv_file_unless_the_event_files_begin_earlier(tmp_path: Path) -> None:
    write_events(tmp_path, [(step, {"a": 7.0}) for step in (2, 3)])
    write_csv(tmp_path, [(step, {"a": 0.1}) for step in (2, 3)])
    assert points(read(tmp_path)) == {"a": {2: 0.1, 3: 0.1}}
    # CSVLogger deletes its file when a run is resumed in its directory; TensorBoardLogger keeps its own.
    write_events(tmp_path, [(step, {"a": 7.0}) for step in (3, 4)])
    write_csv(tmp_path, [(step, {"a": 0.1}) for step in (3, 4)])
    assert points(read(tmp_path)) == {"a": {2: 7.0, 3: 7.0, 4: 7.0}}


def test_every_directory_with_a_log_is_a_run_and_what_is_below_belongs_to_it(tmp_path: Path) -> None:
    for name in ("b/version_10", "b/version_2", "b/version_2/below", "a"):
        write_csv(tmp_path / name, COUNTING)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("nothing to see")
    found = find_logs([tmp_path])
    assert [log.path.relative_to(tmp_path).as_posix() for log in found] == ["a", "b/version_2", "b/version_10"]
    assert not any(log.named for log in found)
    assert [log.named for log in find_logs([tmp_path / "a"])] == [True]


def test_a_run_named_twice_is_one_run(tmp_path: Path) -> None:
    first = write_events(tmp_path / "run", COUNTING[:3])
    second = write_events(tmp_path / "run", COUNTING[3:])
    table = write_csv(tmp_path / "run", COUNTING)
    one = Log(tmp_path / "run", table, (first, second))
    assert find_logs([second, first, table]) == [one]
    assert find_logs([tmp_path, tmp_path / "run", tmp_path / "run" / ".." / "run"]) == [one]
    assert set(points(read(first))["a"]) == {0, 1, 2}


def test_a_csv_file_of_another_name_is_a_run_of_its_own(tmp_path: Path) -> None:
    path = shutil.move(write_csv(tmp_path, COUNTING), tmp_path / "copied.csv")
    assert find_logs([path]) == [Log(path, csv=path)]
    assert points(read(path)) == {"a": {s: -float(s) for s in range(6)}, "b": {s: float(s) for s in range(6)}}


def test_a_csv_file_alone_needs_no_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = write_events(tmp_path / "events", COUNTING)
    shutil.copytree(tmp_path / "events", tmp_path / "both")
    write_csv(tmp_path / "both", COUNTING)
    for module in ("tensorboard", "tensorboard.compat.proto.event_pb2"):
        monkeypatch.setitem(sys.modules, module, None)
    assert list(read(tmp_path / "both").series) == ["a", "b"]
    with pytest.raises(LogError, match=r'needs tensorboard to be read: pip install "lightning-revbn\[plots\]"'):
        read(events)


def garbage(path: Path) -> Path:
    path.write_bytes(random.Random(0).randbytes(3000))
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path / "nowhere", "nowhere does not exist"),
        (
            lambda path: path,
            "holds no log, and its subdirectories hold none: no metrics.csv of CSVLogger, event file",
        ),
        (lambda path: text(path / "metrics.csv", ""), "metrics.csv is empty"),
        (lambda path: text(path / "events.out.tfevents.1", ""), "events.out.tfevents.1 is empty"),
        (lambda path: text(path / "metrics.csv", "a,step\n"), "metrics.csv holds no values"),
        (lambda path: text(path / "metrics.csv", "a,step\nx,1\n"), "metrics.csv holds no values"),
        (
            lambda path: text(path / "other.csv", "a,b\n1,2\n"),
            "other.csv is not a metrics.csv of CSVLogger: it has no column step, but a, b",
        ),
        (lambda path: garbage(path / "metrics.csv"), "metrics.csv is not a metrics.csv of CSVLogger: it is not text"),
        (
            lambda path: garbage(path / "x.tfevents"),
            "x.tfevents is not an event file of TensorBoard, or is damaged from its beginning",
        ),
        (
            lambda path: text(path / "metrics.csv", "step," + "x" * 200_000 + "\n"),
            "metrics.csv is not a metrics.csv of CSVLogger: field larger",
        ),
        (
            lambda path: text(path / "x.tfevents", 64 * "\0"),
            "x.tfevents is not an event file of TensorBoard, or is damaged",
        ),
        (lambda path: write_events(path, []), "holds no values"),
    ],
)
def test_what_is_no_log_is_refused_by_name(make: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(LogError) as error:
        read(make(tmp_path))
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_csv(tmp_path, COUNTING)
    log = find_logs([path])[0]

    def denied(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(LogError, match=r"metrics\.csv cannot be read: Permission denied"):
        read_scalars(log)


def test_an_empty_file_beside_a_log_does_no_harm(tmp_path: Path) -> None:
    write_events(tmp_path, COUNTING)
    (tmp_path / "events.out.tfevents.0").touch()
    assert set(read(tmp_path).series) == {"a", "b"}
    (tmp_path / "metrics.csv").touch()
    scalars = read(tmp_path)
    assert set(scalars.series) == {"a", "b"}
    assert scalars.warnings == (f"{tmp_path / 'metrics.csv'} is empty; read the event files instead",)


@settings(max_examples=200, deadline=None)
@given(
    content=st.binary(max_size=200)
    | st.text("step,ab0123.einf\n\r\"'", max_size=200).map(str.encode)
    | st.text('0123456789.e-,infa\n"', max_size=200).map(lambda text: b"a,step,b\n" + text.encode() + b"\n"),
    name=st.sampled_from(["metrics.csv", "a.tfevents"]),
)
def test_no_bytes_whatever_make_it_fail_in_another_way(content: bytes, name: str, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any" / name
    path.parent.mkdir(exist_ok=True)
    for old in path.parent.iterdir():
        old.unlink()
    path.write_bytes(content)
    scalars = read_or_error(path)
    if isinstance(scalars, str):
        assert len(scalars.splitlines()) == 1
    else:
        assert scalars.series
        for series in scalars.series.values():
            assert (np.diff(series.steps) > 0).all()
            assert len(series.steps) == len(series.values) > 0


def test_progress_counts_the_bytes_of_the_files(tmp_path: Path) -> None:
    for write in (write_csv, write_events):
        path = write(tmp_path / write.__name__, COUNTING)
        (log,) = find_logs([path])
        seen: list[int] = []
        read_scalars(log, seen.append)
        assert sum(seen) == log.size == path.stat().st_size
