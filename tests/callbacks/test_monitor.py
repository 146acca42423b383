from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.lit import LitNet, loader, trainer
from helpers.logs import rows
from helpers.models import BATCH_NORMS, assert_same_parameters, residual_net
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm

LAYER_KEYS = {
    f"revbn/model.{layer}/{kind}_{statistic}"
    for layer in BATCH_NORMS
    for kind in ("scale", "shift")
    for statistic in ("mean", "std", "min", "max", "drift")
}
MODEL_KEYS = {"revbn/scale_mean", "revbn/scale_drift", "revbn/shift_drift", "revbn/scale_lr"}


class Recording(LitNet):
    """Notes the mean scale of bn1 before every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.means: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.means.append(self.model.bn1.weight.mean().item())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("callback", [BatchNormMonitor, RevisitedBatchNorm])
def test_csv_logs_hold_every_key_at_every_logging_step(tmp_path: Path, callback: Any) -> None:
    module = Recording()
    run = trainer(tmp_path, callback(), logger=CSVLogger(tmp_path), log_every_n_steps=3)
    run.fit(module, loader(6))
    logged = rows(tmp_path)
    assert len(logged) == 4
    for row in logged:
        assert row.keys() == LAYER_KEYS | MODEL_KEYS | {"step", "epoch"}
        assert float(row["revbn/model.bn1/scale_mean"]) == pytest.approx(module.means[int(row["step"])], rel=1e-6)


def test_the_steps_are_those_of_lightnings_learning_rate_monitor(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        BatchNormMonitor(),
        LearningRateMonitor(logging_interval="step"),
        logger=CSVLogger(tmp_path),
        log_every_n_steps=4,
        accumulate_grad_batches=2,
        max_epochs=4,
    )
    run.fit(LitNet(), loader(6))
    steps = {key: [row["step"] for row in rows(tmp_path) if key in row] for key in ("lr-SGD", "revbn/scale_mean")}
    # Lightning's monitor logs a step again for every batch that is accumulated in it.
    assert steps["revbn/scale_mean"] == list(dict.fromkeys(steps["lr-SGD"])) == ["3", "7", "11"]


def test_tensorboard_events_hold_the_keys(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, BatchNormMonitor(), logger=logger).fit(LitNet(), loader(2))
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert set(events.Tags()["scalars"]) >= LAYER_KEYS | MODEL_KEYS
    assert [event.step for event in events.Scalars("revbn/scale_mean")] == [0, 1, 2, 3]


def test_every_logger_of_the_trainer_gets_the_statistics(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")]
    trainer(tmp_path, BatchNormMonitor(), logger=loggers).fit(LitNet(), loader(2))
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != []


def test_the_learning_rate_is_the_one_the_scales_learn_with(tmp_path: Path) -> None:
    def configure(module: nn.Module) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.08)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    for name, callback, divisor in (("plain", BatchNormMonitor(), 1), ("ruled", RevisitedBatchNorm(), 100)):
        trainer(tmp_path, callback, logger=CSVLogger(tmp_path / name), max_epochs=1).fit(LitNet(configure), loader(3))
        logged = [float(row["revbn/scale_lr"]) for row in rows(tmp_path / name)]
        assert logged == pytest.approx([0.08 / divisor, 0.04 / divisor, 0.02 / divisor])


def test_its_own_interval_and_prefix_and_no_single_layers(tmp_path: Path) -> None:
    monitor = BatchNormMonitor(every_n_steps=5, per_layer=False, prefix="bn/affine")
    run = trainer(tmp_path, monitor, logger=CSVLogger(tmp_path))
    run.fit(LitNet(), loader(6))
    keys = {key.replace("revbn", "bn/affine") for key in MODEL_KEYS}
    assert [(int(row["step"]), row.keys()) for row in rows(tmp_path)] == [
        (s, keys | {"step", "epoch"}) for s in (0, 5, 10)
    ]
    assert keys <= run.callback_metrics.keys()


def test_other_callbacks_can_watch_the_keys_of_the_whole_model(tmp_path: Path) -> None:
    stop = EarlyStopping("revbn/shift_drift", mode="max", stopping_threshold=0.0, check_on_train_epoch_end=True)
    save = ModelCheckpoint(tmp_path / "saved", monitor="revbn/scale_drift", save_on_train_epoch_end=True)
    run = trainer(tmp_path, BatchNormMonitor(), stop, save, enable_checkpointing=True, logger=CSVLogger(tmp_path))
    run.fit(LitNet(), loader(3))
    assert run.current_epoch == 1
    assert save.best_model_score is not None
    assert not {key for key in run.callback_metrics if key.startswith("revbn/model")}


def test_layers_that_fsdp_has_flattened_are_left_out_with_a_warning(tmp_path: Path) -> None:
    module = LitNet()
    del module.model.bn1.weight
    module.model.bn1.weight = torch.ones(6)  # as FSDP1 sets it with use_orig_params=False
    run = trainer(tmp_path, BatchNormMonitor(), logger=CSVLogger(tmp_path), max_epochs=1)
    with pytest.warns(UserWarning, match="1 batch norm layers are not measured: FSDP made their scales parts"):
        run.fit(module, loader(1))
    (row,) = rows(tmp_path)
    assert "revbn/model.bn2/scale_mean" in row
    assert not [key for key in row if "bn1" in key]


def test_without_a_logger_it_warns_once_and_training_goes_on(tmp_path: Path) -> None:
    run = trainer(tmp_path, BatchNormMonitor())
    with pytest.warns(UserWarning, match="has no logger, so per-layer batch norm statistics are not logged") as said:
        run.fit(LitNet(), loader(3))
    assert len([warning for warning in said if "no logger" in str(warning.message)]) == 1
    assert run.global_step == 6
    assert run.callback_metrics.keys() >= MODEL_KEYS


def test_a_monitor_that_nobody_asked_for_is_silent_without_a_logger(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(tmp_path, RevisitedBatchNorm(), max_epochs=1).fit(LitNet(), loader(1))
    assert not [warning for warning in said if "logger" in str(warning.message)]
    run = trainer(tmp_path, RevisitedBatchNorm(monitor=BatchNormMonitor()), max_epochs=1)
    with pytest.warns(UserWarning, match="BatchNormMonitor: the Trainer has no logger"):
        run.fit(LitNet(), loader(1))


@pytest.mark.parametrize("activations", [False, True])
def test_a_model_without_batch_norm_layers_logs_nothing(activations: bool, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module = LitNet(model=nn.Sequential(nn.Flatten(), nn.Linear(108, 5)))
    trainer(tmp_path, BatchNormMonitor(activations=activations), logger=logger, max_epochs=1).fit(module, loader(3))
    assert logger.experiment.metrics == []
    assert not (Path(logger.log_dir) / "metrics.csv").exists()


def test_monitoring_changes_nothing_of_the_run(tmp_path: Path) -> None:
    plain, watched = LitNet(), LitNet()
    trainer(tmp_path).fit(plain, loader())
    trainer(tmp_path, BatchNormMonitor(), logger=CSVLogger(tmp_path)).fit(watched, loader())
    assert_same_parameters(plain, watched)


@pytest.mark.parametrize("callback", [BatchNormMonitor, RevisitedBatchNorm])
def test_a_resumed_run_measures_drift_from_the_first_start(tmp_path: Path, callback: Any) -> None:
    save = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = trainer(tmp_path, callback(), save, enable_checkpointing=True, logger=CSVLogger(tmp_path / "whole"))
    whole.fit(LitNet(), loader(3))
    torch.load(tmp_path / "saved" / "step=2.ckpt", weights_only=True)
    resumed = trainer(tmp_path, callback(), logger=CSVLogger(tmp_path / "resumed"))
    resumed.fit(LitNet(), loader(3), ckpt_path=tmp_path / "saved" / "step=2.ckpt")
    assert rows(tmp_path / "whole")[2:] == rows(tmp_path / "resumed")


def test_a_second_fit_of_the_same_model_goes_on_and_another_model_starts_again(tmp_path: Path) -> None:
    monitor, module = BatchNormMonitor(), LitNet()
    trainer(tmp_path, monitor, logger=CSVLogger(tmp_path / "1")).fit(module, loader(3))
    trainer(tmp_path, monitor, logger=CSVLogger(tmp_path / "2")).fit(module, loader(3))
    trainer(tmp_path, monitor, logger=CSVLogger(tmp_path / "3")).fit(LitNet(), loader(3))
    drifts = [float(rows(tmp_path / name)[0]["revbn/shift_drift"]) for name in "123"]
    assert drifts[0] == drifts[2] == 0.0 < drifts[1]


def test_a_checkpoint_of_other_layers_starts_drift_again_with_a_warning(tmp_path: Path) -> None:
    monitor = BatchNormMonitor()
    trainer(tmp_path, monitor, logger=CSVLogger(tmp_path / "1"), max_epochs=1).fit(LitNet(), loader(1))
    other = BatchNormMonitor()

    class Loading(LitNet):
        def on_fit_start(self) -> None:
            other.load_state_dict(monitor.state_dict())

    module = Loading(model=residual_net(width=4))
    with pytest.warns(UserWarning, match="drift starts again from the present values"):
        trainer(tmp_path, other, logger=CSVLogger(tmp_path / "2"), max_epochs=1).fit(module, loader(1))


@pytest.mark.parametrize("every_n_steps", [0, -1, True])
def test_an_interval_that_is_not_positive_is_refused(every_n_steps: int) -> None:
    with pytest.raises(ValueError, match="must be a positive whole number"):
        BatchNormMonitor(every_n_steps=every_n_steps)


def test_another_trainer_may_validate_with_the_same_monitor_in_the_middle_of_a_fit(tmp_path: Path) -> None:
    class Evaluated(LitNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    monitor = BatchNormMonitor(activations=True)

    class Evaluating(L.Callback):
        """Comes before the monitor, which waits for the activations of the step until the batch has ended."""

        def on_train_batch_end(self, *args: Any) -> None:
            trainer_of(tmp_path, monitor).validate(Evaluated(), loader(1), verbose=False)

    trainer_of = trainer
    trainer(tmp_path, Evaluating(), monitor, logger=CSVLogger(tmp_path), max_epochs=1).fit(LitNet(), loader(3))
    assert [row["step"] for row in rows(tmp_path) if "revbn/normalized_absmax" in row] == ["0", "1", "2"]
