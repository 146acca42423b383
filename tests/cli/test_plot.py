from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.lit import LitNet, loader, trainer
from helpers.logs import COUNTING, write_csv, write_events
from helpers.models import BATCH_NORMS
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from lightning_revbn import BatchNormMonitor
from lightning_revbn.cli.main import main
from lightning_revbn.core.metric_keys import metric_key
from lightning_revbn.plots.layer_rows import ROWS
from lightning_revbn.runs.batch_norm_runs import Run

AFFINE = ("scale_mean", "shift_mean", "scale_drift", "shift_drift")
ALL = tuple(row.quantity for row in ROWS)
SMALL_NET = ["model.stem.1", "model.block1.bn1", "model.block1.bn2", "model.head.1"]


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, expect exit code 1, and return the one line it said."""
    assert main(["plot", *map(str, arguments)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("lightning-revbn: ")
    return line.removeprefix("lightning-revbn: ")


def logged(
    directory: Path,
    layers: Sequence[str] = SMALL_NET,
    quantities: Sequence[str] = ALL,
    steps: Sequence[int] = range(0, 500, 100),
) -> Path:
    """Write the log of a run whose values differ by layer and step."""
    values = {(layer, step): 0.1 * (depth + 1) + step / 1000 for depth, layer in enumerate(layers) for step in steps}
    events: dict[int, dict[str, float]] = {step: {} for step in steps}
    for (layer, step), value in values.items():
        events[step].update({metric_key("revbn", layer, quantity): value for quantity in quantities})
    write_csv(directory, events.items())
    return directory


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_logs_of_real_runs_are_drawn(kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("baseline", "revisited"):
        run = trainer(tmp_path, BatchNormMonitor(every_n_steps=1), logger=kind(tmp_path, name=name, version="logs"))
        run.fit(LitNet(), loader(2))
    capsys.readouterr()
    assert main(["plot", str(tmp_path), "-o", str(tmp_path / "figure.png")]) == 0
    output = capsys.readouterr()
    assert output.out == f"Figure: {tmp_path / 'figure.png'} (2 runs, {len(BATCH_NORMS)} layers)\n"
    assert output.err == ""
    Image.open(tmp_path / "figure.png").verify()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[Run]]:
    """Note the runs that are drawn instead of drawing them."""
    seen: list[list[Run]] = []
    monkeypatch.setattr("lightning_revbn.plots.layers_figure.draw", lambda runs, style: seen.append(list(runs)))
    monkeypatch.setattr("lightning_revbn.plots.output.save", lambda figure, path: None)
    return seen


def test_runs_are_called_by_the_ends_of_their_paths(tmp_path: Path, drawn: list[list[Run]]) -> None:
    for name in ("a/x/logs", "b/x/logs"):
        logged(tmp_path / name, quantities=AFFINE)
    assert main(["plot", str(tmp_path)]) == 0
    assert main(["plot", str(tmp_path / "a" / "x" / "logs" / "metrics.csv")]) == 0
    assert main(["plot", str(tmp_path), "--labels", "one", "two"]) == 0
    labels = [[run.label for run in runs] for runs in drawn]
    assert labels == [["a/x/logs", "b/x/logs"], ["logs"], ["one", "two"]]


def test_layers_can_be_chosen(tmp_path: Path, drawn: list[list[Run]], capsys: pytest.CaptureFixture[str]) -> None:
    path = logged(tmp_path / "run")
    assert main(["plot", str(path), "--layers", "*.bn?", "model.head.1"]) == 0
    assert drawn[0][0].layers == ("model.block1.bn1", "model.block1.bn2", "model.head.1")
    assert capsys.readouterr().out == "Figure: batch_norms.png (1 run, 3 layers)\n"


def test_the_prefix_can_be_chosen(tmp_path: Path, drawn: list[list[Run]]) -> None:
    keys = [f"{prefix}/{layer}scale_mean" for prefix in ("one", "two/more") for layer in ("", f"{prefix[:3]}/")]
    write_csv(tmp_path, [(0, dict.fromkeys(keys, 1.0))])
    assert main(["plot", str(tmp_path), "--prefix", "two/more"]) == 0
    assert drawn[0][0].layers == ("two",)


def test_runs_of_the_whole_model_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = logged(tmp_path / "run", [""], quantities=["scale_mean", "scale_drift"])
    assert main(["plot", str(path), "-o", str(tmp_path / "figure.svg")]) == 0
    assert capsys.readouterr().out == f"Figure: {tmp_path / 'figure.svg'} (1 run, the whole model)\n"
    assert "--layers: run logged the whole model only" in refused([path, "--layers", "*"], capsys)


def test_a_tree_without_batch_norm_layers_says_so_of_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        write_csv(tmp_path / name, COUNTING)
    assert refused([tmp_path], capsys).startswith("the log of one has no keys revbn/... of batch norm layers")


def test_what_is_damaged_or_missing_is_told_in_one_line_each(
    tmp_path: Path, drawn: list[list[Run]], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["revbn/a/scale_mean", "revbn/scale_mean"]
    path = write_events(tmp_path / "logs" / "a", [(step, dict.fromkeys(keys, math.nan)) for step in range(3)])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    write_csv(tmp_path / "logs" / "b", COUNTING)
    assert main(["plot", str(tmp_path / "logs")]) == 0
    assert [run.label for run in drawn[0]] == ["a"]
    left_out, damaged, gap = capsys.readouterr().err.splitlines()
    assert damaged.startswith(f"lightning-revbn: {path} is damaged or cut off at byte ")
    assert damaged.endswith(f" of {size - 1}; what is before was read")
    assert left_out.startswith("lightning-revbn: left out: the log of b has no keys revbn/... of batch norm layers")
    assert gap == "lightning-revbn: a: values that are NaN or infinite are drawn as gaps: 3 of a"


Arguments = Callable[[Path], list[object]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda path: [path / "nowhere"], "nowhere does not exist"),
        (lambda path: [path / "empty"], "holds no log"),
        (lambda path: ["nowhere", "-o", "figure.jpg"], "figure.jpg must end in any of .png, .svg, .pdf"),
        (lambda path: ["nowhere", "-o", "figure"], "figure must end in any of .png, .svg, .pdf"),
        (lambda path: ["nowhere", "-o", path / "no" / "a.png"], "no/a.png cannot be written: the directory "),
        (lambda path: ["nowhere", "-o", path / "a.png"], "a.png cannot be written: it is a directory"),
        (
            lambda path: [path / "run", "--layers", "*.bn1", "block1.bn3"],
            "--layers: the pattern 'block1.bn3' matches none of the model's 4 batch norm layers; the nearest names are "
            "'model.block1.bn",
        ),
        (lambda path: [path, "--layers", "*head*"], "--layers: no pattern matches a layer of other"),
        (lambda path: [path, "--labels", "one"], "--labels has 1 names for 2 runs: other, run"),
        (
            lambda path: [path / "run", "--prefix", "bn"],
            "the log of run has no keys bn/... of batch norm layers (it has revbn/",
        ),
        (
            lambda path: [path / "loss"],
            "the log of loss has no keys revbn/... of batch norm layers (it has a, b): add BatchNormMonitor()",
        ),
        (lambda path: [path / "run", path / "loss"], "the log of loss has no keys revbn/..."),
        (lambda path: [path / "std"], "nothing to draw: no layer has any of scale_mean, "),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    arguments: Arguments, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs" / "empty").mkdir(parents=True)
    (tmp_path / "logs" / "a.png").mkdir()
    logged(tmp_path / "logs" / "run", steps=[0])
    logged(tmp_path / "logs" / "other", ["model.block1.bn1"], steps=[0])
    write_csv(tmp_path / "loss", COUNTING)
    write_csv(tmp_path / "std", [(0, {"revbn/a/scale_std": 1.0, "revbn/b/scale_std": 1.0})])
    for name in ("loss", "std"):
        if any(name in str(argument) for argument in arguments(Path())[:2]):
            (tmp_path / name).rename(tmp_path / "logs" / name)
    assert said in refused(arguments(tmp_path / "logs"), capsys)
    assert not (tmp_path / "batch_norms.png").exists()


def test_more_than_eight_runs_are_refused_before_they_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(9):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "metrics.csv").touch()
    assert refused([tmp_path], capsys).startswith("9 runs were found, and side by side no more can be read than 8")


def test_a_file_that_cannot_be_written_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = logged(tmp_path / "run", steps=[0])

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    line = refused([path, "-o", tmp_path / "figure.svg"], capsys)
    assert line == f"{tmp_path / 'figure.svg'} cannot be written: No space left on device"


def test_missing_libraries_are_named_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_events(tmp_path, COUNTING)
    remedy = 'pip install "lightning-revbn[plots]"'
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
        assert refused([tmp_path], capsys).endswith(f"needs tensorboard to be read: {remedy}")
    monkeypatch.delitem(sys.modules, "lightning_revbn.plots.layers_figure")
    monkeypatch.delattr("lightning_revbn.plots.layers_figure")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused(["nowhere"], capsys) == f"figures need matplotlib: {remedy}"


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["logs", "--style", "pie"], ["logs", "--layers"], ["logs", "--unknown"]):
        with pytest.raises(SystemExit) as exit_:
            main(["plot", *arguments])
        assert exit_.value.code == 2
        assert "usage: lightning-revbn" in capsys.readouterr().err


def test_a_layer_whose_name_is_also_a_pattern_is_chosen_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = logged(tmp_path / "run", ["model.a[0]", "model.a0", "model.b"])
    assert main(["plot", str(logs), "-o", str(tmp_path / "figure.png"), "--layers", "model.a[0]"]) == 0
    assert "(1 run, 1 layer)" in capsys.readouterr().out
