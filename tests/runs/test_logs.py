from __future__ import annotations

import io
import math
import random
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.lit import LitNet, loader, trainer
from helpers.models import BATCH_NORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_revbn import BatchNormMonitor
from lightning_revbn.runs.logs import (
    Log,
    LogError,
    Scalars,
    batch_norm_run,
    find_logs,
    find_prefix,
    progress_bar,
    read_scalars,
)

Events = Iterable[tuple[int, Mapping[str, float]]]


class Recorder(DummyLogger):
    """Remembers what loggers are given."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        for key, value in metrics.items():
            self.values.setdefault(key, {})[step] = float(value)


def write_csv(directory: Path, events: Events) -> Path:
    logger = CSVLogger(directory / "new", name="", version="")  # it warns of directories that hold other files
    for step, metrics in events:
        logger.log_metrics(dict(metrics), step=step)
    logger.save()
    shutil.move(directory / "new" / "metrics.csv", directory / "metrics.csv")
    shutil.rmtree(directory / "new")  # older versions of Lightning write hparams.yaml too
    return directory / "metrics.csv"


def write_events(directory: Path, events: Events) -> Path:
    with SummaryWriter(str(directory)) as writer:
        for step, metrics in events:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)
    return max(directory.glob("*tfevents*"), key=lambda path: path.name)


def read(path: Path) -> Scalars:
    (log,) = find_logs([path])
    return read_scalars(log)


def read_or_error(path: Path) -> Scalars | str:
    """Return what can be read, or the one line that says why not."""
    try:
        return read(path)
    except LogError as error:
        return str(error)


def points(scalars: Scalars) -> dict[str, dict[int, float]]:
    return {
        key: dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
        for key, series in scalars.series.items()
    }


COUNTING = [(step, {"b": float(step), "a": -float(step)}) for step in range(6)]


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


@pytest.mark.parametrize(
    ("kind", "order"), [("csv", sorted(BATCH_NORMS)), ("both", BATCH_NORMS), ("events", BATCH_NORMS)]
)
def test_layers_are_in_the_order_of_the_model_if_event_files_tell(kind: str, order: list[str], tmp_path: Path) -> None:
    loggers = [
        CSVLogger(tmp_path / "run", name="", version=""),
        TensorBoardLogger(tmp_path / "run", name="", version=""),
    ]
    chosen = {"csv": loggers[:1], "events": loggers[1:], "both": loggers}[kind]
    trainer(tmp_path, BatchNormMonitor(every_n_steps=1), logger=chosen).fit(LitNet(), loader(1))
    run = batch_norm_run("run", read(tmp_path / "run"))
    assert run.layers == tuple(f"model.{name}" for name in order)
    assert run.by_depth == (kind != "csv")


def test_layers_without_an_order_are_sorted_with_numbers_by_value(tmp_path: Path) -> None:
    names = ["layer10.bn", "layer9.bn", "layer9.10", "layer9.9"]
    write_csv(tmp_path, [(0, {f"revbn/{name}/scale_mean": 1.0 for name in names})])
    assert batch_norm_run("", read(tmp_path)).layers == ("layer9.9", "layer9.10", "layer9.bn", "layer10.bn")


def test_layers_that_have_different_quantities_are_sorted_too(tmp_path: Path) -> None:
    keys = ["a/scale_mean", "b/normalized_absmax", "c/normalized_absmax"]
    write_csv(tmp_path, [(0, {f"revbn/{key}": 1.0 for key in keys})])
    assert batch_norm_run("", read(tmp_path)).layers == ("a", "b", "c")


def test_layers_without_a_scale_keep_their_place(tmp_path: Path) -> None:
    keys = ["b/scale_mean", "d/scale_mean", *(f"{layer}/normalized_absmax" for layer in "abcd")]
    write_events(tmp_path, [(0, {f"revbn/{key}": 1.0 for key in keys})])
    assert batch_norm_run("", read(tmp_path)).layers == ("a", "b", "c", "d")


@pytest.mark.parametrize("write", [write_csv, write_events])
def test_the_last_value_of_a_step_counts_and_steps_are_sorted(write: Any, tmp_path: Path) -> None:
    write(tmp_path, [(5, {"a": 1.0}), (3, {"a": 2.0}), (5, {"a": 3.0}), (4, {"a": math.nan}), (6, {"a": -math.inf})])
    series = read(tmp_path).series["a"]
    assert series.steps.tolist() == [3, 4, 5, 6]
    assert np.array_equal(series.values, [2.0, math.nan, 3.0, -math.inf], equal_nan=True)


def test_steps_that_no_run_can_reach_are_left_out(tmp_path: Path) -> None:
    write_events(tmp_path, [(2**60, {"a": 1.0}), (2**53, {"a": 2.0})])
    assert points(read(tmp_path)) == {"a": {2**53: 2.0}}


def test_a_resumed_run_replaces_what_was_logged_after_its_checkpoint(tmp_path: Path) -> None:
    write_events(tmp_path, [(step, {"a": 1.0, "b": 1.0}) for step in (0, 10, 20, 30)])
    write_events(tmp_path, [(step, {"a": 2.0}) for step in (15, 25)])
    assert points(read(tmp_path)) == {
        "a": {0: 1.0, 10: 1.0, 15: 2.0, 25: 2.0},
        "b": {0: 1.0, 10: 1.0, 20: 1.0, 30: 1.0},
    }


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


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path / "nowhere", "nowhere does not exist"),
        (
            lambda path: path,
            "holds no log, nor does a directory below: neither metrics.csv of CSVLogger nor an event file",
        ),
        (lambda path: text(path / "metrics.csv", ""), "metrics.csv is empty"),
        (lambda path: text(path / "events.out.tfevents.1", ""), "events.out.tfevents.1 is empty"),
        (lambda path: text(path / "metrics.csv", "a,step\n"), "metrics.csv holds no values"),
        (lambda path: text(path / "metrics.csv", "a,step\nx,1\n"), "metrics.csv holds no values"),
        (
            lambda path: text(path / "other.csv", "a,b\n1,2\n"),
            "other.csv is no metrics.csv of CSVLogger: it has no column step, but a, b",
        ),
        (lambda path: garbage(path / "metrics.csv"), "metrics.csv is no metrics.csv of CSVLogger: it is not text"),
        (
            lambda path: garbage(path / "x.tfevents"),
            "x.tfevents is no event file of TensorBoard, or is damaged from its beginning",
        ),
        (
            lambda path: text(path / "metrics.csv", "step," + "x" * 200_000 + "\n"),
            "metrics.csv is no metrics.csv of CSVLogger: field larger",
        ),
        (
            lambda path: text(path / "x.tfevents", 64 * "\0"),
            "x.tfevents is no event file of TensorBoard, or is damaged",
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


def test_a_csv_file_cut_off_anywhere_gives_its_whole_lines(tmp_path: Path) -> None:
    path = write_csv(tmp_path, [(step, {"a": step / 7, "b": step / 3}) for step in range(3)])
    content = path.read_bytes()
    assert content.count(b"\n") == 4
    for length in range(1, len(content)):
        path.write_bytes(content[:length])
        lines = content[:length].count(b"\r") - 1
        if lines < 1:
            with pytest.raises(LogError):
                read(path)
            continue
        scalars = read(path)
        assert points(scalars) == {"a": {s: s / 7 for s in range(lines)}, "b": {s: s / 3 for s in range(lines)}}
        cut = not content[:length].endswith((b"\r", b"\n"))
        assert scalars.warnings == (f"{path}: ends in the middle of a line, which was left out",) * cut


def test_rows_without_a_step_are_left_out_and_counted(tmp_path: Path) -> None:
    path = text(tmp_path / "metrics.csv", "a,step\n1,0\n2,\n3,nan\n4,1e300\n5\n,\n6,2.0\n")
    scalars = read(path)
    assert points(scalars) == {"a": {0: 1.0, 2: 6.0}}
    assert scalars.warnings == (f"{path}: rows without a step were left out: 4",)


def test_an_event_file_cut_off_anywhere_gives_what_is_before(tmp_path: Path) -> None:
    path = write_events(tmp_path, COUNTING)
    content = path.read_bytes()
    whole = points(read(path))
    lengths = [*range(1, len(content), 5)]
    counts: list[int] = []
    for length in lengths:
        path.write_bytes(content[:length])
        scalars = read_or_error(path)
        if isinstance(scalars, str):
            assert "tfevents" in scalars or "holds no values" in scalars
            counts.append(0)
            continue
        found = points(scalars)
        assert all(found[key].items() <= whole[key].items() for key in found)
        counts.append(sum(map(len, found.values())))
        assert all("is damaged or cut off at byte" in warning for warning in scalars.warnings)
    assert counts == sorted(counts)
    assert set(counts) == set(range(12))


def test_an_event_file_with_damage_inside_gives_what_is_before_and_says_so(tmp_path: Path) -> None:
    path = write_events(tmp_path, COUNTING)
    content = path.read_bytes()
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        scalars = read_or_error(path)
        if isinstance(scalars, str):
            assert len(scalars.splitlines()) == 1
        else:
            assert sum(len(own) for own in points(scalars).values()) <= 12
            assert len(scalars.warnings) <= 1
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(40) + content[middle + 40 :])
    scalars = read(path)
    assert points(scalars)["b"].keys() == {0, 1, 2}
    assert [warning.split(" is ")[1].split(" at ")[0] for warning in scalars.warnings] == ["damaged or cut off"]


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


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (["loss", "revbn/scale_mean", "revbn/a/scale_mean", "other/scale_mean"], "revbn"),
        (["bn/affine/scale_mean", "bn/affine/a.b/scale_mean", "bn/loss"], "bn/affine"),
        (["revbn/own/scale_mean", "revbn/own/a/scale_std"], "revbn/own"),
        (["bn/a/scale_mean", "bn/b/scale_mean"], "bn"),
        (["scale_mean", "a/scale_mean"], ""),
        (["loss"], "revbn"),
    ],
)
def test_the_prefix_is_found(keys: list[str], prefix: str) -> None:
    assert find_prefix(keys) == prefix


def test_several_prefixes_are_an_error_that_names_them() -> None:
    with pytest.raises(LogError, match="under one, two: choose by --prefix"):
        find_prefix(["one/scale_mean", "one/a/scale_mean", "two/scale_mean"])


@pytest.mark.parametrize("prefix", ["revbn", "bn/affine", ""])
def test_runs_with_any_prefix_are_found_without_being_told(prefix: str, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "run", name="", version="")
    trainer(tmp_path, BatchNormMonitor(every_n_steps=1, prefix=prefix), logger=logger).fit(LitNet(), loader(1))
    scalars = read(tmp_path / "run")
    for given_prefix in (None, prefix):
        run = batch_norm_run("run", scalars, given_prefix)
        assert set(run.layers) == {f"model.{name}" for name in BATCH_NORMS}
        first = f"{prefix}/" if prefix else ""
        assert run.series["model.bn1", "scale_mean"] is scalars.series[f"{first}model.bn1/scale_mean"]


def test_a_run_with_per_layer_false_is_one_of_the_whole_model(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "run", name="", version="")
    monitor = BatchNormMonitor(every_n_steps=1, per_layer=False)
    trainer(tmp_path, monitor, logger=logger).fit(LitNet(), loader(1))
    run = batch_norm_run("run", read(tmp_path / "run"))
    assert (run.layers, run.whole_model) == (("",), True)
    assert {quantity for _, quantity in run.series} == {"scale_mean", "scale_drift", "shift_drift"}


def test_a_model_that_is_one_batch_norm_layer_has_an_empty_name(tmp_path: Path) -> None:
    keys = [f"revbn/{kind}_{s}" for kind in ("scale", "shift") for s in ("mean", "std", "min", "max", "drift")]
    write_csv(tmp_path, [(0, {**dict.fromkeys(keys, 1.0), "revbn/scale_lr": 0.1})])
    run = batch_norm_run("run", read(tmp_path))
    assert (run.layers, run.whole_model) == (("",), False)
    assert set(run.series) == {("", key.removeprefix("revbn/")) for key in keys}


def test_a_log_without_batch_norm_layers_says_what_to_do(tmp_path: Path) -> None:
    write_csv(tmp_path, [(0, {f"loss_{letter}": 1.0 for letter in "abcdefg"})])
    with pytest.raises(LogError) as error:
        batch_norm_run("version_0", read(tmp_path))
    assert str(error.value) == (
        "the log of version_0 has no keys revbn/... of batch norm layers (it has loss_a, loss_b, loss_c, loss_d, "
        "loss_e, ...): add BatchNormMonitor() to the Trainer's callbacks"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("terminal", "wait", "shown"), [(True, 0, True), (True, 60, False), (False, 0, False)])
def test_the_progress_bar_shows_on_terminals_and_when_it_takes_long(
    terminal: bool, wait: float, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("Reading logs", 10, wait) as advance:
        advance(5)
        advance(5)
    output = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("Reading logs" in output) == shown
    assert output.endswith("\x1b[2K") == shown


def test_there_is_no_progress_bar_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "rich", None)
    with progress_bar("Reading logs", 10, 0) as advance:
        advance(10)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_progress_counts_the_bytes_of_the_files(tmp_path: Path) -> None:
    for write in (write_csv, write_events):
        path = write(tmp_path / write.__name__, COUNTING)
        (log,) = find_logs([path])
        seen: list[int] = []
        read_scalars(log, seen.append)
        assert sum(seen) == log.size == path.stat().st_size
