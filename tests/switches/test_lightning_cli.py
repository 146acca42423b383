"""Configuration files and the group `revbn`, with the LightningCLI of both packages."""

from __future__ import annotations

import functools
import inspect
import shutil
import sys
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
import yaml
from helpers.lit import LitNet, loader, quiet, trainer
from helpers.logs import rows
from helpers.models import assert_same_parameters, residual_net
from helpers.raw import RawData
from helpers.scripts import run_code
from helpers.states import same
from torch import Tensor
from torch.nn.functional import cross_entropy

import lightning_revbn
from lightning_revbn import InputNorm, OnlineInputNormMixin, RevBNCLI, RevBNCLIMixin, RevisitedBatchNorm
from lightning_revbn.lightning_compat import adopt

PATTERNS = {"*.bn1": 0.5, "*": 0.25}


@pytest.fixture(autouse=True)
def _command_line_of_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what seed_everything writes into goes with it
    monkeypatch.setenv("COLUMNS", "120")


def net_of(package: Any) -> Any:
    class Net(package.LightningModule):
        """A net that trains as `LitNet` does."""

        def __init__(self, lr: float = 0.05) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.lr = lr
            self.model = residual_net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", cross_entropy(self.model(batch[0]), batch[1]))

        test_step = validation_step

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.01)

    return Net


def data_of(package: Any) -> Any:
    class Data(package.LightningDataModule):
        """Six batches, in order."""

        def train_dataloader(self) -> Any:
            return loader()

        val_dataloader = test_dataloader = train_dataloader

    return Data


def name_of(package: Any) -> str:
    return package.Trainer.__module__.partition(".trainer.")[0]


def cli_of(package: Any) -> Any:
    return import_module(f"{name_of(package)}.cli").LightningCLI


def flag_of(package: Any) -> Any:
    return RevBNCLI if package is L else type("Program", (RevBNCLIMixin, cli_of(package)), {})


def run(kind: Any, path: Path, *arguments: str, command: str = "fit", package: Any = L, data: Any = None) -> Any:
    """Run a command of a program; its Trainer logs to `path` / logs and logs every step."""
    logger = f"{name_of(package)}.loggers.CSVLogger"
    settings = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(path),
        "logger": {"class_path": logger, "init_args": {"save_dir": str(path), "name": "logs", "version": ""}},
    }
    file = path / f"{command}.yaml"
    file.write_text(yaml.safe_dump({"trainer": settings}))
    return kind(net_of(package), data or data_of(package), args=[command, "--config", str(file), *arguments])


def write(path: Path, text: str) -> str:
    path.write_text(dedent(text))
    return str(path)


def listed(path: Path) -> str:
    """Write a configuration that lists the callback, with lists, patterns and a monitor."""
    return write(
        path / "callback.yaml",
        """
        trainer:
          callbacks:
            - class_path: lightning_revbn.RevisitedBatchNorm
              init_args:
                scale: {"*.bn1": 0.5, "*": 0.25}
                include: ["model.*"]
                exclude: ["*.stem.*"]
                monitor:
                  class_path: lightning_revbn.BatchNormMonitor
                  init_args: {every_n_steps: 3}
        """,
    )


@pytest.mark.parametrize("package", [L, pl])
def test_a_callback_that_a_configuration_lists_trains_as_in_a_script(package: Any, tmp_path: Path) -> None:
    program = run(cli_of(package), tmp_path, "--config", listed(tmp_path), package=package)
    expected = LitNet()
    trainer(tmp_path, quiet(scale=PATTERNS, include=["model.*"], exclude=["*.stem.*"])).fit(expected, loader())
    assert_same_parameters(expected, program.model)
    assert [row["step"] for row in rows(tmp_path / "logs") if "revbn/scale_mean" in row] == ["0", "3", "6", "9"]


@pytest.mark.parametrize("package", [L, pl])
def test_the_saved_configuration_makes_the_same_callback_again(package: Any, tmp_path: Path) -> None:
    first = run(cli_of(package), tmp_path, "--config", listed(tmp_path), package=package)
    saved = tmp_path / "logs" / "config.yaml"
    again = cli_of(package)(
        net_of(package),
        data_of(package),
        args=["--config", write(tmp_path / "again.yaml", _without_ckpt_path(saved))],
        run=False,
    )
    ours, theirs = (
        next(found for found in program.trainer.callbacks if isinstance(found, RevisitedBatchNorm))
        for program in (first, again)
    )
    assert theirs._selection == ours._selection
    assert theirs._selection.scale == PATTERNS
    assert theirs.monitor is not None
    assert theirs.monitor.every_n_steps == 3


def _without_ckpt_path(saved: Path) -> str:
    """Return a configuration of `fit` as one of a program without subcommands, which has no arguments of `fit`."""
    settings = yaml.safe_load(saved.read_text())
    return yaml.safe_dump({key: settings[key] for key in ("seed_everything", "trainer", "model")}, sort_keys=False)


@pytest.mark.parametrize("package", [L, pl])
def test_the_flag_trains_as_the_callback_in_a_script_does(package: Any, tmp_path: Path) -> None:
    program = run(
        flag_of(package), tmp_path, "--revbn.enabled", "true", "--revbn.scale", "0.25", "--revbn.exclude", '["*.bn2"]',
        package=package,
    )  # fmt: skip
    expected = LitNet()
    trainer(tmp_path, quiet(scale=0.25, exclude=["*.bn2"])).fit(expected, loader())
    assert_same_parameters(expected, program.model)
    assert any("revbn/scale_mean" in row for row in rows(tmp_path / "logs"))


@pytest.mark.parametrize("package", [L, pl])
def test_the_flag_off_trains_and_saves_as_the_lightningcli_without_it(package: Any, tmp_path: Path) -> None:
    results = []
    for kind in (cli_of(package), flag_of(package)):
        folder = tmp_path / "run"  # the same, for checkpoints have paths in them
        folder.mkdir()
        settings = [] if kind is cli_of(package) else ["--revbn.enabled", "false", "--revbn.scale", "0.25"]
        program = run(kind, folder, "--seed_everything", "3", *settings, package=package)
        assert not any(isinstance(callback, RevisitedBatchNorm) for callback in program.trainer.callbacks)
        (file,) = folder.rglob("*.ckpt")
        results.append((program.model, torch.load(file, weights_only=True)))
        assert len(list(folder.rglob("config.yaml"))) == 1
        shutil.rmtree(folder)
    (plain, checkpoint), (off, checkpoint_off) = results
    assert_same_parameters(plain, off)
    assert same(checkpoint, checkpoint_off)


def test_the_group_of_a_configuration_file_sets_every_argument(tmp_path: Path) -> None:
    settings = {
        "scale": PATTERNS,
        "scale_lr_divisor": 50.0,
        "shift_lr_multiplier": 3.0,
        "eps": 1e-3,
        "weight_decay_exempt": "vectors",
        "include": ["model.*"],
        "exclude": ["*.stem.*"],
        "zero_scale": "overwrite",
        "trained": "error",
        "monitor": {"class_path": "lightning_revbn.BatchNormMonitor", "init_args": {"every_n_steps": 3}},
        "enabled": True,
    }
    assert settings.keys() == inspect.signature(RevisitedBatchNorm).parameters.keys()
    file = write(tmp_path / "revbn.yaml", yaml.safe_dump({"revbn": settings}, sort_keys=False))
    program = run(RevBNCLI, tmp_path, "--config", file)
    (callback,) = (found for found in program.trainer.callbacks if isinstance(found, RevisitedBatchNorm))
    for name, value in settings.items():
        if name != "monitor":
            found = getattr(callback, name)
            assert (list(found) if isinstance(found, tuple) else found) == value
    assert callback.monitor is not None
    assert callback.monitor.every_n_steps == 3
    saved = yaml.safe_load((tmp_path / "logs" / "config.yaml").read_text())["revbn"]
    assert {**saved, "monitor": None} == {**settings, "monitor": None}
    assert saved["monitor"]["init_args"]["every_n_steps"] == 3


def test_the_monitor_of_the_group_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    monitor = "{class_path: lightning_revbn.BatchNormMonitor, init_args: {every_n_steps: 3}}"
    run(RevBNCLI, tmp_path, "--revbn.enabled", "true", "--revbn.monitor", write(tmp_path / "monitor.yaml", monitor))
    assert [row["step"] for row in rows(tmp_path / "logs") if "revbn/scale_mean" in row] == ["0", "3", "6", "9"]


def test_help_has_every_argument_with_its_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(RevBNCLI, tmp_path, "--help")
    printed = capsys.readouterr().out
    assert "Start batch norm scales below 1" in printed
    words = " ".join(printed[printed.index("  --revbn CONFIG") :].split())
    for argument in (
        "--revbn.scale SCALE The starting value of the scales, or a mapping from name patterns to values",
        "--revbn.scale_lr_divisor SCALE_LR_DIVISOR The constant c.",
        "--revbn.weight_decay_exempt WEIGHT_DECAY_EXEMPT The parameters without weight decay:",
        "`fnmatch` patterns on dotted module names; a layer must match one of them.",
        "Patterns of layers to leave alone; stronger than `include`.",
        "--revbn.zero_scale {keep,overwrite}",
        "--revbn.trained {keep,overwrite,error}",
        "--revbn.monitor MONITOR Whether to log statistics",
        "--revbn.enabled {true,false} The switch for configuration files: with False the callback does nothing. "
        "(type: bool, default: False)",
    ):
        assert argument in words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--revbn.scales 0.1", "nrecognized arguments: --revbn.scales 0.1"),
        ("--config unknown.yaml", "revbn.scales"),
        ("--revbn.scale big", 'Parser key "revbn.scale":'),
        ("--revbn.exclude stem", 'Parser key "revbn.exclude":'),
        ("--revbn.zero_scale no", 'Parser key "revbn.zero_scale":'),
        (
            "--revbn.scale 0",
            "revbn: scale=0.0 must be finite and positive; the method uses values below 1",
        ),
        ("--revbn.scale_lr_divisor .inf", "revbn: the divisor of the scales' learning rate must be finite"),
        ("--config monitor.yaml", "every_n_steps=0 must be a positive whole number, or None"),
        ("--config missing.yaml", "File does not exist"),
        ("--revbn missing.yaml", 'Unable to load config "missing.yaml"'),
    ],
)
def test_a_wrong_setting_ends_the_program_before_a_model_is_made(
    arguments: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monitor = "{class_path: lightning_revbn.BatchNormMonitor, init_args: {every_n_steps: 0}}"
    write(tmp_path / "unknown.yaml", "revbn: {scales: 0.1}")
    write(tmp_path / "monitor.yaml", f"revbn: {{monitor: {monitor}}}")
    monkeypatch.setattr(RevBNCLI, "instantiate_classes", lambda self: pytest.fail("a model is made"))
    with pytest.raises(SystemExit) as ended:
        run(RevBNCLI, tmp_path, "--revbn.enabled", "true", *arguments.split())
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("place", ["configuration", "program", "group"])
def test_a_second_callback_beside_the_flag_is_one_error(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Program(RevBNCLI):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            own = {"trainer_defaults": {"callbacks": RevisitedBatchNorm(enabled=False)}} if place == "program" else {}
            super().__init__(*args, **own, **kwargs)

        def add_arguments_to_parser(self, parser: Any) -> None:
            if place == "group":
                parser.add_lightning_class_args(RevisitedBatchNorm, "own")

    more = ["--config", listed(tmp_path)] if place == "configuration" else []
    with pytest.raises(SystemExit):
        run(Program, tmp_path, "--revbn.enabled", "true", *more)
    assert (
        "error: two callbacks: revbn.enabled is true, and the Trainer has a RevisitedBatchNorm of its own, from "
        "trainer.callbacks or the program. Set revbn.enabled to false, or remove the other callback"
    ) in capsys.readouterr().err


def test_another_callback_of_a_configuration_stays_beside_the_flag(tmp_path: Path) -> None:
    file = write(tmp_path / "one.yaml", "trainer: {callbacks: {class_path: lightning_revbn.BatchNormMonitor}}")
    program = run(RevBNCLI, tmp_path, "--config", file, "--revbn.enabled", "true", "--trainer.fast_dev_run", "true")
    names = [type(callback).__name__ for callback in program.trainer.callbacks]
    assert {"BatchNormMonitor", "RevisitedBatchNorm"} <= set(names)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_other_commands_take_the_group_and_leave_scales_alone(command: str, tmp_path: Path) -> None:
    program = run(RevBNCLI, tmp_path, "--revbn.enabled", "true", command=command)
    assert_same_parameters(LitNet(), program.model)


def test_a_printed_configuration_has_the_group_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(RevBNCLI, tmp_path, "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["revbn"]
    assert printed["enabled"] is False
    assert printed["scale"] == 0.1


def test_a_run_with_the_flag_is_resumed_with_it_from_its_checkpoint(tmp_path: Path) -> None:
    on = ("--revbn.enabled", "true", "--revbn.scale", "0.25")
    half, rest = tmp_path / "half", tmp_path / "rest"
    half.mkdir()
    rest.mkdir()
    run(RevBNCLI, half, *on, "--trainer.max_epochs", "1")
    (checkpoint,) = half.rglob("*.ckpt")
    program = run(RevBNCLI, rest, *on, "--ckpt_path", str(checkpoint), "--trainer.enable_checkpointing", "false")
    whole = LitNet()
    trainer(tmp_path, quiet(scale=0.25)).fit(whole, loader())
    assert_same_parameters(whole, program.model)


def test_the_mixin_behind_the_lightningcli_is_refused() -> None:
    for kind in (cli_of(L), cli_of(pl)):
        with pytest.raises(TypeError, match=r"must come before LightningCLI .*: class Own\(RevBNCLIMixin, Lightning"):
            type("Own", (kind, RevBNCLIMixin), {})


def test_without_jsonargparse_the_package_imports_and_the_cli_says_what_to_install() -> None:
    code = """
import sys, importlib.metadata as metadata
for name in ("jsonargparse", "docstring_parser"):
    sys.modules[name] = None
real = metadata.distribution
def distribution(name):
    if name == "jsonargparse":
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.distribution = distribution
metadata.version = lambda name: distribution(name).version
import lightning_revbn
try:
    lightning_revbn.RevBNCLI()
except ModuleNotFoundError as error:
    print(error)
"""
    assert run_code(code) == 'RevBNCLI needs jsonargparse: pip install "lightning-revbn[lightning-cli]"\n'


def test_a_callback_becomes_one_of_pytorch_lightning_once_and_keeps_its_methods() -> None:
    class Own(L.Callback):
        pass

    adopt(Own)
    adopt(Own)
    assert Own.__bases__ == (L.Callback, pl.Callback)
    assert issubclass(lightning_revbn.BatchNormMonitor, pl.Callback)


class Raw(OnlineInputNormMixin, L.LightningDataModule):
    """Raw batches; the settings of their normalisation are the argument that the mixin has."""

    def train_dataloader(self) -> Any:
        return RawData().train_dataloader()

    val_dataloader = train_dataloader


class RawByArgument(Raw):
    def __init__(self, input_norm: InputNorm) -> None:
        super().__init__(input_norm=input_norm)


class RawByKeywords(Raw):
    def __init__(self, batch_size: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@pytest.mark.parametrize("data", [Raw, RawByArgument, RawByKeywords])
@pytest.mark.parametrize("by_class_path", [False, True])
def test_a_configured_input_normalisation_trains_as_in_a_script(data: Any, by_class_path: bool, tmp_path: Path) -> None:
    chosen = {"channels": [0, 2], "clip": 3.0, "fill": -1.0, "nodata": -9999 if by_class_path else [0, 255]}
    arguments = {"input_norm": {"num_features": 3, "mode": "ema", "momentum": 0.2, **chosen}}
    class_path = {"class_path": f"{__name__}.{data.__name__}", "init_args": arguments}
    file = write(tmp_path / "data.yaml", yaml.safe_dump({"data": class_path if by_class_path else arguments}))
    kind = functools.partial(RevBNCLI, subclass_mode_data=by_class_path)
    program = run(kind, tmp_path, "--config", file, "--revbn.enabled", "true", data=data)
    expected = net_of(L)()
    trainer(tmp_path, quiet()).fit(
        expected, data(input_norm=InputNorm(num_features=3, mode="ema", momentum=0.2, **chosen))
    )
    assert_same_parameters(expected, program.model)
    saved = yaml.safe_load((tmp_path / "logs" / "config.yaml").read_text())["data"]
    written = (saved["init_args"] if by_class_path else saved)["input_norm"]
    assert written["momentum"] == 0.2
    assert {name: written[name] for name in chosen} == chosen


def test_a_wrong_setting_of_the_input_normalisation_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting, message in (
        ("num_features: 0", "num_features=0 must be the number of channels"),
        ("num_features: 3, channels: [0, 3]", "channels=[0, 3] must be different numbers from 0 to 2"),
        ("num_features: 3, clip: 0.0", "clip=0.0 must be a number of standard deviations above 0"),
    ):
        file = write(tmp_path / "data.yaml", f"data: {{input_norm: {{{setting}}}}}")
        with pytest.raises((SystemExit, ValueError)) as raised:
            run(RevBNCLI, tmp_path, "--config", file, data=Raw)
        assert message in capsys.readouterr().err + str(raised.value)


@pytest.mark.parametrize("package", [L, pl])
def test_numbers_may_be_written_without_a_dot(package: Any, tmp_path: Path) -> None:
    listed = {"class_path": "lightning_revbn.RevisitedBatchNorm", "init_args": {"scale": 0.5}}
    text = yaml.safe_dump({"trainer": {"logger": False, "callbacks": [listed]}}).replace("0.5", "5e-1")
    by_file = cli_of(package)(net_of(package), args=["--config", write(tmp_path / "list.yaml", text)], run=False)
    group = write(tmp_path / "group.yaml", "trainer: {logger: false}\nrevbn: {enabled: true, scale: {'*': 5e-1}}")
    flags = ["--config", group, "--revbn.scale_lr_divisor", "5e1"]
    by_flag = flag_of(package)(net_of(package), args=flags, run=False)
    for program, scale, divisor in ((by_file, 0.5, 100.0), (by_flag, {"*": 0.5}, 50.0)):
        (callback,) = (one for one in program.trainer.callbacks if isinstance(one, RevisitedBatchNorm))
        assert callback.scale == scale
        assert callback.scale_lr_divisor == divisor
