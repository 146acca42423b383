"""The settings in force, in the hyperparameters of loggers written for real and read back, and in the checkpoint."""

from __future__ import annotations

import importlib
import inspect
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
import yaml
from helpers.lit import LitNet, loader, quiet, sgd, trainer
from helpers.models import residual_net
from helpers.pages import blocks_of
from helpers.wandb_records import wandb_records
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.nn.functional import cross_entropy

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm
from lightning_revbn.callbacks import hyperparameters
from lightning_revbn.callbacks.saved_by_arguments import restore
from lightning_revbn.switches.environment_callback import callback_from

USERS = {"width": 6, "optimizer": {"name": "sgd"}}
DEFAULTS = {
    "revbn/scale": 0.1,
    "revbn/scale_lr_divisor": 100.0,
    "revbn/shift_lr_multiplier": 1.0,
    "revbn/eps": None,
    "revbn/weight_decay_exempt": "scale",
    "revbn/include": '["*"]',
    "revbn/exclude": "[]",
    "revbn/zero_scale": "keep",
    "revbn/trained": "keep",
}
PATTERNS: dict[str, Any] = {"scale": {"*.bn1": 0.5, "*": 0.25}, "exclude": ["*.stem.*"], "weight_decay_exempt": None}
BY_PATTERNS = {
    **DEFAULTS,
    "revbn/scale": '{"*.bn1": 0.5, "*": 0.25}',
    "revbn/exclude": '["*.stem.*"]',
    "revbn/weight_decay_exempt": None,
}


class Tuned(LitNet):
    def __init__(self, width: int = 6, optimizer: Any = USERS["optimizer"]) -> None:
        super().__init__(model=residual_net(width=width))
        self.save_hyperparameters()


class Mine(RevisitedBatchNorm):
    def __init__(self, own: str) -> None:
        super().__init__(scale=0.2)
        self.own = own


def fit(path: Path, logger: Any, *callbacks: Any, module: LitNet | None = None, ckpt_path: Path | None = None) -> Any:
    run = trainer(path, *callbacks, logger=logger, max_epochs=1)
    run.fit(Tuned() if module is None else module, loader(2), ckpt_path=ckpt_path)
    return run


def in_yaml(path: Path) -> dict[str, Any]:
    (file,) = path.rglob("hparams.yaml")
    return yaml.safe_load(file.read_text())


def sessions(logger: TensorBoardLogger) -> list[dict[str, Any]]:
    """The sets of hyperparameters in the event files of a run, of which TensorBoard shows the first."""
    found: list[dict[str, Any]] = []
    for file in sorted(Path(logger.log_dir).glob("events.*")):
        for value in (value for event in EventFileLoader(str(file)).Load() for value in event.summary.value):
            if value.tag == "_hparams_/session_start_info":
                data = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                held = data.session_start_info.hparams
                values = {key: getattr(held[key], held[key].WhichOneof("kind")) for key in held}
                # TensorBoard has no value for None, so Lightning writes the word.
                found.append({key: None if value == "None" else value for key, value in values.items()})
    return found


def scalars(logger: TensorBoardLogger) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
        if not tag.startswith("revbn/")
    }


@pytest.mark.parametrize(("settings", "logged"), [({}, DEFAULTS), (PATTERNS, BY_PATTERNS)])
@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_file_of_hyperparameters_has_the_settings_beside_the_users(
    kind: Any, settings: dict[str, Any], logged: dict[str, Any], tmp_path: Path
) -> None:
    fit(tmp_path, kind(tmp_path / "log"), quiet(**settings))
    assert in_yaml(tmp_path / "log") == {**USERS, **logged}


def test_the_page_shows_these_settings() -> None:
    (block,) = blocks_of("docs/how_it_works.md", "yaml")
    assert yaml.safe_load(block.code) == {"width": USERS["width"], **DEFAULTS}


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_network_without_hyperparameters_logs_the_settings_alone(kind: Any, tmp_path: Path) -> None:
    fit(tmp_path, kind(tmp_path / "log"), quiet(), module=LitNet())
    assert in_yaml(tmp_path / "log") == DEFAULTS


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_callback_that_is_switched_off_adds_nothing(kind: Any, tmp_path: Path) -> None:
    fit(tmp_path, kind(tmp_path / "log"), quiet(enabled=False))
    assert in_yaml(tmp_path / "log") == USERS


BASELINE = {
    **DEFAULTS,
    "revbn/scale": 1.0,
    "revbn/scale_lr_divisor": 1.0,
    "revbn/weight_decay_exempt": None,
}


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_monitor_of_a_baseline_logs_the_same_keys(kind: Any, tmp_path: Path) -> None:
    fit(tmp_path, kind(tmp_path / "log"), BatchNormMonitor())
    assert in_yaml(tmp_path / "log") == {**USERS, **BASELINE}


@pytest.mark.parametrize("order", [1, -1])
def test_beside_the_callback_a_monitor_leaves_the_settings_to_it(order: int, tmp_path: Path) -> None:
    fit(tmp_path, CSVLogger(tmp_path / "log"), *[BatchNormMonitor(), RevisitedBatchNorm()][::order])
    assert in_yaml(tmp_path / "log") == {**USERS, **DEFAULTS}


def test_beside_a_callback_that_is_switched_off_a_monitor_is_of_a_baseline(tmp_path: Path) -> None:
    fit(tmp_path, CSVLogger(tmp_path / "log"), RevisitedBatchNorm(enabled=False), BatchNormMonitor())
    assert in_yaml(tmp_path / "log") == {**USERS, **BASELINE}


@pytest.mark.parametrize("callback", [BatchNormMonitor, RevisitedBatchNorm])
def test_the_seed_of_seed_everything_is_logged(callback: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "")  # restored at the end, whatever seed_everything writes
    seed_everything(17, verbose=False)
    module = Tuned()
    fit(tmp_path, CSVLogger(tmp_path / "log"), callback(), module=module)
    assert in_yaml(tmp_path / "log")["revbn/seed"] == 17
    assert dict(module.hparams) == USERS


def test_tensorboards_page_of_hyperparameters_tells_the_arms_apart(tmp_path: Path) -> None:
    shown: list[dict[str, Any]] = []
    for name, callback in (("baseline", BatchNormMonitor()), ("revisited", RevisitedBatchNorm())):
        logger = TensorBoardLogger(tmp_path / name)
        fit(tmp_path, logger, callback)
        shown += sessions(logger)
    baseline, revisited = shown  # one set for each run
    assert baseline.keys() == revisited.keys()  # the page takes its columns from one run
    assert (baseline["revbn/scale"], revisited["revbn/scale"]) == (1.0, 0.1)
    assert {type(value) for value in (baseline["revbn/scale"], revisited["revbn/scale"])} == {float}


def test_tensorboard_shows_one_set_of_hyperparameters_and_the_metrics_of_a_run_without(tmp_path: Path) -> None:
    without, revisited = TensorBoardLogger(tmp_path / "without"), TensorBoardLogger(tmp_path / "with")
    fit(tmp_path, without)
    fit(tmp_path, revisited, quiet(**PATTERNS))
    (theirs,), (both,) = sessions(without), sessions(revisited)
    assert theirs == {"width": 6.0, "optimizer/name": "sgd"}
    assert both == {**theirs, **BY_PATTERNS}
    assert scalars(without) == scalars(revisited) == {"hp_metric": [(0, -1.0)]}


@pytest.mark.parametrize("hp_metric", [True, False])
def test_tensorboard_gets_no_set_where_the_user_logs_none(hp_metric: bool, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=hp_metric)
    fit(tmp_path, logger, quiet(), module=LitNet())
    assert not sessions(logger)
    assert not scalars(logger)


def test_hyperparameters_that_the_user_logs_by_hand_keep_their_metrics(tmp_path: Path) -> None:
    class ByHand(LitNet):
        def on_train_start(self) -> None:
            self.logger.log_hyperparams(Namespace(**USERS), {"hp/loss": 0.5})

    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    fit(tmp_path, logger, quiet(), module=ByHand())
    assert sessions(logger) == [{"width": 6.0, "optimizer/name": "sgd", **DEFAULTS}]
    assert scalars(logger) == {"hp/loss": [(0, 0.5)]}
    assert "log_hyperparams" not in vars(logger)


def test_wandb_has_the_settings_in_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(tmp_path, logger, quiet(**PATTERNS))
    logger.experiment.finish()
    wandb.teardown()  # its service may write for a while after the run has finished
    (file,) = tmp_path.rglob("*.wandb")
    held = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in wandb_records(file)
        for item in record.config.update
    }
    assert {**USERS, **BY_PATTERNS}.items() <= held.items()


def test_mlflow_has_the_settings_and_a_second_fit_with_others_is_told_and_trains(tmp_path: Path) -> None:
    def mlflow(run_id: str | None = None) -> MLFlowLogger:
        return MLFlowLogger("experiment", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", run_id=run_id)

    first = mlflow()
    fit(tmp_path, first, quiet(**PATTERNS))
    run = first.experiment.get_run(first.run_id)
    expected = {"width": "6", "optimizer/name": "sgd", **BY_PATTERNS, "revbn/weight_decay_exempt": "None"}
    assert run.data.params == {key: str(value) for key, value in expected.items()}

    fit(tmp_path, mlflow(first.run_id), quiet(**PATTERNS))  # the same once more is no error
    with pytest.warns(UserWarning, match="MLFlowLogger did not take the settings"):
        again = fit(tmp_path, mlflow(first.run_id), quiet(scale=0.7))
    assert again.global_step == 2


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_loggers_of_both_packages_get_the_settings_of_the_variable(package: str, tmp_path: Path) -> None:
    pytorch = importlib.import_module(package)
    loggers = importlib.import_module(f"{package}.loggers")

    class Net(pytorch.LightningModule):
        def __init__(self, width: int = 6) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = residual_net(width=width)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return sgd(self)

    board = loggers.TensorBoardLogger(tmp_path / "board")
    run = pytorch.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=[loggers.CSVLogger(tmp_path / "csv"), board],
        callbacks=[callback_from("scale=0.3,monitor=false", "LIGHTNING_REVBN")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    run.fit(Net(), loader(2))
    expected = {"width": 6, **DEFAULTS, "revbn/scale": 0.3}
    assert in_yaml(tmp_path / "csv") == in_yaml(tmp_path / "board") == expected
    assert sessions(board) == [expected]


class Refusing(CSVLogger):
    def log_hyperparams(self, params: Any = None) -> None:
        raise RuntimeError("the service is down")


def test_a_logger_that_refuses_is_named_and_the_others_and_training_go_on(tmp_path: Path) -> None:
    loggers: list[Logger] = [Refusing(tmp_path / "refusing"), CSVLogger(tmp_path / "log")]
    with pytest.warns(UserWarning, match=r"Refusing did not take the settings .* the service is down"):
        run = fit(tmp_path, loggers, quiet(), module=LitNet())
    assert run.global_step == 2
    assert in_yaml(tmp_path / "log") == DEFAULTS


@pytest.mark.parametrize(("first_rank", "wanted"), [(False, True), (True, False)])
def test_other_ranks_and_runs_without_hyperparameters_log_none(first_rank: bool, wanted: bool, tmp_path: Path) -> None:
    log = SimpleNamespace(
        is_global_zero=first_rank,
        enable_autolog_hparams=wanted,
        loggers=[Refusing(tmp_path), TensorBoardLogger(tmp_path)],
    )
    hyperparameters.log(log, {"scale": 0.1})
    assert hyperparameters.announce(log, {"scale": 0.1}) == []


def test_the_checkpoint_tells_every_setting_and_not_among_the_users_hyperparameters(tmp_path: Path) -> None:
    fit(tmp_path, CSVLogger(tmp_path / "log"), quiet(**PATTERNS)).save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    state = saved["callbacks"]["RevisitedBatchNorm"]
    told = {f"revbn/{name}": value for name, value in state.items()}
    assert {key: value for key, value in told.items() if key in DEFAULTS} == {
        **BY_PATTERNS,
        "revbn/scale": PATTERNS["scale"],
        "revbn/include": ["*"],
        "revbn/exclude": PATTERNS["exclude"],
    }
    assert list(state["scale"]) == list(PATTERNS["scale"])  # the first pattern that matches counts
    assert saved["hyper_parameters"] == USERS
    assert dict(Tuned.load_from_checkpoint(tmp_path / "run.ckpt").hparams) == USERS


def test_a_resumed_run_with_other_settings_is_told_each_and_an_older_state_is_taken(tmp_path: Path) -> None:
    fit(tmp_path, False, quiet()).save_checkpoint(tmp_path / "run.ckpt")
    with pytest.warns(UserWarning, match="the checkpoint was made with") as told:
        fit(tmp_path, False, quiet(exclude=["*.bn2"], zero_scale="overwrite"), ckpt_path=tmp_path / "run.ckpt")
    said = [str(warning.message).partition("made with ")[2].partition(". ")[0] for warning in told]
    assert "exclude=[], this run has exclude=['*.bn2']" in said
    assert "zero_scale='keep', this run has zero_scale='overwrite'" in said
    assert len([text for text in said if text]) == 2
    older = {"scale": 0.1, "scale_lr_divisor": 100.0, "weight_decay_exempt": "scale", "zero_kept": ["model.bn2"]}
    callback = RevisitedBatchNorm(exclude=["*.bn1"])
    callback.load_state_dict(older)
    assert callback.state_dict()["zero_kept"] == ["model.bn2"]


@pytest.mark.parametrize(
    "given",
    [
        RevisitedBatchNorm(),
        RevisitedBatchNorm(
            {"*.bn1": 0.5, "*": 0.25}, 10, weight_decay_exempt=None, exclude=["*.stem.*"], monitor=False
        ),
        RevisitedBatchNorm(enabled=False, monitor=BatchNormMonitor(2, activations=True, progress_bar=True)),
        BatchNormMonitor(prefix="mine"),
    ],
)
def test_a_callback_among_the_users_hyperparameters_is_logged_saved_and_loaded(given: Any, tmp_path: Path) -> None:
    class Holding(LitNet):
        def __init__(self, callback: Any, width: int = 6) -> None:
            super().__init__()
            self.save_hyperparameters()

    loggers: list[Any] = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")]
    run = fit(tmp_path, loggers, given, module=Holding(given))  # it has trained, and knows of the module
    run.save_checkpoint(tmp_path / "end.ckpt")
    for logger in loggers:
        assert "width: 6" in (Path(logger.log_dir) / "hparams.yaml").read_text()
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["hyper_parameters"]["callback"]
    assert type(saved) is type(given)
    assert saved._arguments().keys() == inspect.signature(type(given)).parameters.keys()
    for name, value in given._arguments().items():
        if isinstance(value, BatchNormMonitor):
            assert saved._arguments()[name]._arguments() == value._arguments()
        else:
            assert saved._arguments()[name] == value
    loaded = Holding.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    fit(tmp_path, CSVLogger(tmp_path / "again"), loaded.hparams["callback"])


def test_what_a_checkpoint_names_is_made_only_if_it_is_a_callback_of_the_package() -> None:
    with pytest.raises(TypeError, match="is not a callback of lightning_revbn"):
        restore(dict, {"a": 1})  # type: ignore[arg-type]


def test_a_subclass_of_a_users_is_pickled_with_what_it_has(tmp_path: Path) -> None:
    callback = Mine("x")
    torch.save(callback, tmp_path / "callback.pt")
    loaded = torch.load(tmp_path / "callback.pt", weights_only=False)
    assert (type(loaded), loaded.own, loaded.scale) == (Mine, "x", 0.2)
