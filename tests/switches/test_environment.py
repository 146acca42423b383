"""LIGHTNING_REVBN in the environment, with `lightning` and with `pytorch_lightning`."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
from helpers.lit import LitNet, loader, quiet, sgd, trainer
from helpers.logs import rows
from helpers.models import assert_same_parameters, residual_net
from helpers.scripts import run_code, run_ranks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_revbn import InputNorm, OnlineInputNormMixin, RevisitedBatchNorm
from lightning_revbn.switches.environment import callbacks
from lightning_revbn.switches.environment_callback import RevisitedBatchNormFromEnvironment, callback_from


@pytest.fixture
def entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Trainers load the factory, whether or not the installed metadata is of this version."""
    for package in (L, pl):
        connector = sys.modules[f"{package.Trainer.__module__.rpartition('.')[0]}.connectors.callback_connector"]
        monkeypatch.setattr(connector, "_load_external_callbacks", lambda group: callbacks())


class PlNet(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = residual_net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return sgd(self)


def fit(
    net: Any, path: Path, *own: Any, package: Any = L, data: Any = None, ckpt_path: Path | None = None, **options: Any
) -> Any:
    run = package.Trainer(
        accelerator="cpu",
        default_root_dir=path,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"logger": False, "enable_checkpointing": False, "max_epochs": 2, "callbacks": list(own), **options},
    )
    run.fit(net, data if data is not None else loader(), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("value", [None, "", "0", "false", "off"])
def test_switched_off_the_entry_point_gives_nothing_and_imports_nothing(value: str | None) -> None:
    setting = "" if value is None else f"os.environ['LIGHTNING_REVBN'] = {value!r}"
    code = (
        f"import os, sys; os.environ.pop('LIGHTNING_REVBN', None); {setting or 'pass'}\n"
        "from lightning_revbn.switches.environment import callbacks\n"
        "assert callbacks() == []\nassert not {'torch', 'lightning', 'yaml'} & sys.modules.keys()"
    )
    run_code(code)


@pytest.mark.usefixtures("entry_point")
def test_the_variable_trains_as_the_callback_in_the_script_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_script, by_variable = LitNet(), LitNet()
    fit(by_script, tmp_path, quiet(scale=0.2, scale_lr_divisor=50))
    monkeypatch.setenv("LIGHTNING_REVBN", "scale=0.2,scale_lr_divisor=50")
    fit(by_variable, tmp_path, logger=CSVLogger(tmp_path, name="", version=""))
    assert_same_parameters(by_script, by_variable)
    assert any("revbn/scale_mean" in row for row in rows(tmp_path))


@pytest.mark.usefixtures("entry_point")
@pytest.mark.parametrize("first", ["script", "variable"])
def test_a_run_of_either_way_is_resumed_by_the_other(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def callbacks_of(way: str) -> list[Any]:
        if way == "variable":
            monkeypatch.setenv("LIGHTNING_REVBN", "scale=0.2,monitor=false")
            return []
        monkeypatch.delenv("LIGHTNING_REVBN", raising=False)
        return [quiet(scale=0.2)]

    def zero_kept() -> LitNet:  # a layer that only the callback's state knows of, once it has trained
        return LitNet(model=residual_net(zero_init_residual=True))

    whole, half, resumed = zero_kept(), zero_kept(), zero_kept()
    fit(whole, tmp_path, quiet(scale=0.2))
    run = fit(half, tmp_path, *callbacks_of(first), max_epochs=1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    other = "script" if first == "variable" else "variable"
    run = fit(resumed, tmp_path, *callbacks_of(other), ckpt_path=tmp_path / "half.ckpt")
    assert_same_parameters(whole, resumed)
    run.save_checkpoint(tmp_path / "end.ckpt")
    states = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    assert {key for key in states if "Revisited" in key} == {"RevisitedBatchNorm"}


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_the_installed_package_tells_both_lightnings_of_the_factory(package: str) -> None:
    (found,) = (
        point for point in entry_points(group=f"{package}.callbacks_factory") if point.dist.name == "lightning-revbn"
    )
    assert found.load() is callbacks


@pytest.mark.usefixtures("entry_point")
def test_children_of_ddp_are_switched_on_too(tmp_path: Path) -> None:
    run_ranks("by_variable.py", tmp_path, env={"LIGHTNING_REVBN": "scale=0.2"})
    for rank in range(2):
        scales = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert all(torch.equal(scale, torch.full_like(scale, 0.2)) for scale in scales)


@pytest.mark.usefixtures("entry_point")
def test_the_callback_of_the_script_wins_over_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone, beside = LitNet(), LitNet()
    fit(alone, tmp_path, quiet(scale=0.5))
    monkeypatch.setenv("LIGHTNING_REVBN", "scale=0.2")
    with caplog.at_level("INFO"):
        fit(beside, tmp_path, quiet(scale=0.5))
    assert_same_parameters(alone, beside)
    assert caplog.text.count("LIGHTNING_REVBN has no effect") == 1


@pytest.mark.usefixtures("entry_point")
@pytest.mark.parametrize("package", [L, pl])
def test_one_list_of_callbacks_may_be_given_to_several_trainers(
    package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [package.Callback()]  # which Lightning extends in place by what the variable asks for
    net = LitNet if package is L else PlNet
    for fold, scale in enumerate((0.2, 0.2, 0.3)):
        monkeypatch.setenv("LIGHTNING_REVBN", f"scale={scale},monitor=false")
        by_script, by_variable = net(), net()
        fit(by_script, tmp_path, quiet(scale=scale), package=package, max_epochs=1)
        run = fit(by_variable, tmp_path, package=package, callbacks=shared, max_epochs=1)
        assert len([callback for callback in shared if isinstance(callback, RevisitedBatchNorm)]) == fold + 1
        assert_same_parameters(by_script, by_variable)
        run.save_checkpoint(tmp_path / "end.ckpt")
        states = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
        assert states["RevisitedBatchNorm"]["scale"] == scale
        assert len([key for key in states if "Revisited" in key]) == 1


@pytest.mark.usefixtures("entry_point")
@pytest.mark.parametrize("stage", ["validate", "fit"])
def test_another_trainer_with_the_callbacks_of_a_running_fit_leaves_that_fit_alone(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evaluated(LitNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    nested = LitNet()

    class Nesting(L.Callback):
        nests = True

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if not self.nests:
                return
            self.nests = False
            # Lightning extends the list of the running Trainer in place by what the variable asks for.
            options: Any = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
            other = L.Trainer(callbacks=trainer.callbacks, max_epochs=1, enable_model_summary=False, **options)
            if stage == "validate":
                other.validate(Evaluated(), loader(), verbose=False)
            else:
                other.fit(nested, loader())

    monkeypatch.setenv("LIGHTNING_REVBN", "scale=0.2")
    by_script, by_variable, alone = LitNet(), LitNet(), LitNet()
    fit(by_script, tmp_path, quiet(scale=0.2), max_epochs=2)
    run = fit(by_variable, tmp_path, Nesting(), logger=CSVLogger(tmp_path, name="", version=""))
    assert len([callback for callback in run.callbacks if isinstance(callback, RevisitedBatchNorm)]) == 2
    assert_same_parameters(by_script, by_variable)
    assert len([row for row in rows(tmp_path) if "revbn/scale_lr" in row]) == run.global_step
    if stage == "fit":
        fit(alone, tmp_path, quiet(scale=0.2), max_epochs=1)
        assert_same_parameters(nested, alone)

    run.save_checkpoint(tmp_path / "end.ckpt")
    states = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    assert [key for key in states if "Revisited" in key] == ["RevisitedBatchNorm"]


@pytest.mark.usefixtures("entry_point")
def test_a_list_of_callbacks_carries_none_over_to_a_trainer_without_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, plain, baseline = [L.Callback()], LitNet(), LitNet()
    monkeypatch.setenv("LIGHTNING_REVBN", "monitor=false")
    fit(LitNet(), tmp_path, callbacks=shared, max_epochs=1)
    monkeypatch.delenv("LIGHTNING_REVBN")
    fit(plain, tmp_path, max_epochs=1)
    with pytest.warns(UserWarning, match="LIGHTNING_REVBN has no effect: it is off now, and was on when this"):
        fit(baseline, tmp_path, callbacks=shared, max_epochs=1)
    assert_same_parameters(plain, baseline)


@pytest.mark.parametrize(
    "numbers", ["scale: 1e-1\nscale_lr_divisor: 5e1", "scale: {'*': 1e-1}\nscale_lr_divisor: '5e1'"]
)
def test_a_yaml_file_may_write_numbers_without_a_dot(numbers: str, tmp_path: Path) -> None:
    file = tmp_path / "revbn.yaml"
    file.write_text(numbers)
    callback = callback_from(str(file), "LIGHTNING_REVBN")
    assert callback.scale in (0.1, {"*": 0.1})
    assert callback.scale_lr_divisor == 50.0
    assert callback_from("scale=1e-1,scale_lr_divisor=5e1", "LIGHTNING_REVBN").scale == 0.1


def test_a_yaml_file_may_hold_patterns_and_the_monitor(tmp_path: Path) -> None:
    file = tmp_path / "revbn.yaml"
    file.write_text("scale: {'*.stem.*': 0.5, '*': 0.25}\nexclude: ['*.bn2']\nmonitor: {every_n_steps: 3}\n")
    callback = callback_from(str(file), "LIGHTNING_REVBN")
    assert isinstance(callback, RevisitedBatchNormFromEnvironment)
    assert callback.scale == {"*.stem.*": 0.5, "*": 0.25}
    assert callback.exclude == ("*.bn2",)
    assert callback.monitor is not None
    assert callback.monitor.every_n_steps == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scales=0.1", "unknown key 'scales'"),
        ("scale=big", "got 'big'"),
        ("scale=0", "scale"),
        ("missing.yaml", "missing.yaml' does not exist"),
        ("maybe", "'maybe' must be key=value"),
        ("monitor=3", "monitor must be true or false, got 3"),
    ],
)
def test_a_bad_value_is_one_error_that_names_the_variable_and_the_keys(text: str, said: str) -> None:
    with pytest.raises(MisconfigurationException) as raised:
        callback_from(text, "LIGHTNING_REVBN")
    assert f"LIGHTNING_REVBN={text!r}" in str(raised.value)
    assert said in str(raised.value)
    assert "scale_lr_divisor" in str(raised.value)


ALIASES = "\n".join(
    ["a0: &a0 [0.1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)), "scale: *a9"]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10))]
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (ALIASES, "unknown key 'a0'"),
        (
            f"exclude: [{', '.join(line.partition(': ')[2] for line in ALIASES.splitlines())}]",
            "exclude is nested too deep",
        ),
        ("scale: &a [[0.1]]\neps: [*a, *a]", "scale is nested too deep: give a value, a list of values or a mapping"),
        ("scale: &a [*a]", "scale is nested too deep"),
        ("scale: {'*': {'*': 0.1}}", "scale is nested too deep"),
        (MERGES, "settings take no merge key <<"),
        ("word " * 10_000, "must hold a mapping of settings, it holds a str"),
        ("- 1", "it holds a list"),
        ("", "it holds a NoneType"),
        ("#" * 2**21, "has 2,097,152 bytes, too many for a file of settings"),
        ("scale: 0.1\nscale: 0.2", "the key 'scale' stands twice"),
        ("monitor: {prefix: a, prefix: b}", "the key 'prefix' stands twice"),
        ("monitor: {activations: 'false'}", "activations of monitor must be true or false, got 'false'"),
        ("monitor: {per_layer: 0}", "per_layer of monitor must be true or false, got 0"),
        ("monitor: {prefix: 3}", "prefix of monitor must be a text, got 3"),
        ("monitor: {every_n_steps: '3'}", "every_n_steps='3' must be a positive whole number"),
        ("monitor: {every: 3}", "unknown key 'every' of monitor, which has every_n_steps, per_layer"),
        ("monitor: [true]", "monitor must be true or false, got [True]"),
        ("include: {a: b}", "include takes a name pattern or a list of patterns, got {'a': 'b'}"),
        ("exclude: null", "exclude takes a name pattern or a list of patterns, got None"),
        ("scale: [" + "9" * 10_000 + "]", "scale"),
        ("[" * 10_000, ""),
        ("scale: *nowhere", "found undefined alias"),
        ("\x00", ""),
    ],
    ids=range(24),
)
def test_a_file_that_is_wrong_is_one_short_line(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "revbn.yaml"
    file.write_text(content)
    with pytest.raises(MisconfigurationException) as raised:
        callback_from(str(file), "LIGHTNING_REVBN")
    assert said in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scale=0.1,scale=0.2", "the key 'scale' stands twice"),
        ("x" * 200_000, "must be key=value"),
        ("scale=" + "9" * 5000, "scale"),
        ("scale=" + "(" * 5000, ""),
        ("scale=\x1b[2J\n", "scale"),
    ],
    ids=range(5),
)
def test_a_text_that_is_wrong_is_one_short_line(text: str, said: str) -> None:
    with pytest.raises(MisconfigurationException) as raised:
        callback_from(text, "LIGHTNING_REVBN")
    assert said in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


def test_settings_may_be_longer_than_the_name_of_a_file() -> None:
    pattern = "*" + "x" * 300
    assert callback_from(f"exclude={pattern},scale=0.2", "LIGHTNING_REVBN").exclude == (pattern,)


def raw(base: type) -> Any:
    class Raw(OnlineInputNormMixin, base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(input_norm=InputNorm(num_features=3))

        def train_dataloader(self) -> Any:
            return loader()

    return Raw()


@pytest.mark.usefixtures("entry_point")
@pytest.mark.parametrize("by", ["script", "variable"])
def test_pytorch_lightning_trains_as_lightning_does_with_callback_and_mixin(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = LitNet(), PlNet()
    run = trainer(tmp_path, quiet())
    run.fit(ours, raw(L.LightningDataModule))
    own = [quiet()] if by == "script" else []
    if by == "variable":
        monkeypatch.setenv("LIGHTNING_REVBN", "monitor=false")
    fit(theirs, tmp_path, *own, package=pl, data=raw(pl.LightningDataModule))
    assert_same_parameters(ours, theirs)


def test_the_mixin_behind_the_datamodule_of_pytorch_lightning_is_refused() -> None:
    with pytest.raises(TypeError, match="must come before LightningDataModule"):

        class Wrong(pl.LightningDataModule, OnlineInputNormMixin):
            pass


def test_tensorboard_of_pytorch_lightning_gets_the_layout_of_the_layers(tmp_path: Path) -> None:
    from pytorch_lightning.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path)
    seen: list[Any] = []
    logger.experiment.add_custom_scalars = seen.append
    fit(PlNet(), tmp_path, RevisitedBatchNorm(), package=pl, logger=logger)
    assert len(seen) == 1
