"""BatchNormMonitor with the loggers that people use, each written for real and read back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from helpers.lit import LitNet, loader, trainer
from helpers.logs import rows
from helpers.models import BATCH_NORMS
from helpers.wandb_records import wandb_records
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm

LAYER_KEYS = {
    f"revbn/model.{layer}/{quantity}"
    for layer in BATCH_NORMS
    for quantity in (
        *(f"{kind}_{statistic}" for kind in ("scale", "shift") for statistic in ("mean", "std", "min", "max", "drift")),
        "normalized_absmax",
        "normalized_over_3",
    )
}
MODEL_KEYS = {
    f"revbn/{key}"
    for key in ("scale_mean", "scale_drift", "shift_drift", "scale_lr", "normalized_absmax", "normalized_over_3")
}
HISTOGRAM_KEYS = {f"revbn/model.{layer}/{kind}" for layer in BATCH_NORMS for kind in ("scale", "shift")}


def fit(path: Path, *loggers: Logger, histograms: bool = True) -> LitNet:
    """Train four steps, logging at steps 1 and 3, beside a CSVLogger that tells what the others must hold."""
    module = LitNet()
    monitor = BatchNormMonitor(activations=True, histograms=histograms)
    run = trainer(path, monitor, logger=[CSVLogger(path / "csv"), *loggers], log_every_n_steps=2)
    run.fit(module, loader(2))
    return module


def reference(path: Path) -> dict[int, dict[str, float]]:
    """What was logged at each step, by the CSVLogger's file."""
    logged = {
        int(row["step"]): {key: float(value) for key, value in row.items() if key not in ("step", "epoch")}
        for row in rows(path / "csv")
    }
    assert list(logged) == [1, 3]
    assert {frozenset(values) for values in logged.values()} == {frozenset(LAYER_KEYS | MODEL_KEYS)}
    return logged


def events(logger: TensorBoardLogger) -> EventAccumulator:
    accumulator = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_holds_every_key_at_the_right_steps_and_histograms(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    module = fit(tmp_path, logger)
    accumulator = events(logger)
    for step, values in reference(tmp_path).items():
        for key, value in values.items():
            held = {event.step: event.value for event in accumulator.Scalars(key)}
            assert list(held) == [1, 3]
            assert held[step] == pytest.approx(value, rel=1e-6)
    assert set(accumulator.Tags()["histograms"]) == HISTOGRAM_KEYS
    last = accumulator.Histograms("revbn/model.bn1/shift")[-1]
    assert last.step == 3
    assert last.histogram_value.num == module.model.bn1.num_features


def test_tensorboard_groups_the_layers_on_its_page_of_custom_scalars(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, logger)
    accumulator = events(logger)
    (event,) = accumulator.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [
        "revbn: the whole model",
        "revbn: model.stem.1 to model.bn2",
    ]
    scalars = accumulator.Tags()["scalars"]
    patterns = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert len(patterns) == 6 + 6 * len(BATCH_NORMS)
    for pattern in patterns:
        assert len([tag for tag in scalars if re.match(pattern, tag)]) == 1, pattern


def test_wandb_offline_holds_every_key_and_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(tmp_path, logger)
    logger.experiment.finish()
    wandb.teardown()  # its service may write for a while after the run has finished
    (file,) = tmp_path.rglob("*.wandb")
    history = {row["trainer/global_step"]: row for row in wandb_history(file)}
    for step, values in reference(tmp_path).items():
        for key, value in values.items():
            assert history[step][key] == pytest.approx(value)
        assert {key for key, value in history[step].items() if value == "histogram"} == {
            f"{key}/_type" for key in HISTOGRAM_KEYS
        }


def wandb_history(file: Path) -> Iterator[dict[str, Any]]:
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def test_mlflow_holds_every_key(tmp_path: Path) -> None:
    logger = MLFlowLogger("experiment", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    fit(tmp_path, logger, histograms=False)
    for step, values in reference(tmp_path).items():
        for key, value in values.items():
            held = {metric.step: metric.value for metric in logger.experiment.get_metric_history(logger.run_id, key)}
            assert held[step] == pytest.approx(value)


class Counting(CSVLogger):
    """Notes every call."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.calls: list[tuple[int | None, int]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls.append((step, len(metrics)))
        super().log_metrics(metrics, step)


@pytest.mark.parametrize("callback", [BatchNormMonitor, RevisitedBatchNorm])
@pytest.mark.parametrize("activations", [False, True])
def test_every_logger_gets_one_dict_a_logging_step(tmp_path: Path, callback: Any, activations: bool) -> None:
    monitor = BatchNormMonitor(activations=activations)
    callback = RevisitedBatchNorm(monitor=monitor) if callback is RevisitedBatchNorm else monitor
    loggers = [Counting(tmp_path / "a"), Counting(tmp_path / "b")]
    run = trainer(tmp_path, callback, logger=loggers, accumulate_grad_batches=2, log_every_n_steps=1)
    run.fit(LitNet(), loader(6))
    keys = len(LAYER_KEYS | MODEL_KEYS) if activations else len(LAYER_KEYS | MODEL_KEYS) - 2 * len(BATCH_NORMS) - 2
    assert loggers[0].calls == loggers[1].calls == [(step, keys + 1) for step in range(6)]  # and the epoch


def test_events_have_the_epoch_as_lightnings_own_metrics_do(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    fit(tmp_path, board)
    assert [(row["step"], row["epoch"]) for row in rows(tmp_path / "csv")] == [("1", "0"), ("3", "1")]
    assert [(event.step, event.value) for event in events(board).Scalars("epoch")] == [(1, 0), (3, 1)]


class Failing(CSVLogger):
    """Takes nothing of the monitor's."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "revbn/scale_mean" in metrics:
            raise OSError("no space left\n" + "x" * 5000)
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_is_named_once_and_the_others_and_training_go_on(tmp_path: Path) -> None:
    loggers = [Failing(tmp_path / "failing"), CSVLogger(tmp_path / "csv")]
    run = trainer(tmp_path, BatchNormMonitor(), logger=loggers, log_every_n_steps=1)
    with pytest.warns(UserWarning, match="Failing did not take the batch norm metrics.*OSError: no space left") as told:
        run.fit(LitNet(), loader(2))
    (warning,) = [str(warning.message) for warning in told if "did not take" in str(warning.message)]
    assert len(warning) < 600
    assert "\n" not in warning
    assert run.global_step == 4
    assert len(rows(tmp_path / "csv")) == 4


def test_histograms_without_a_logger_that_takes_them_are_warned_about(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="histograms need a TensorBoardLogger or a WandbLogger"):
        fit(tmp_path)
    assert reference(tmp_path)


def test_scales_that_are_not_numbers_break_no_histogram(tmp_path: Path) -> None:
    class Broken(LitNet):
        def on_train_start(self) -> None:
            nn.init.constant_(self.model.bn1.weight, float("nan"))
            self.model.bn2.weight.data[0] = float("inf")

    logger = TensorBoardLogger(tmp_path)
    monitor = BatchNormMonitor(histograms=True)
    trainer(tmp_path, monitor, logger=logger, max_epochs=1).fit(Broken(), loader(1))
    accumulator = events(logger)
    assert set(accumulator.Tags()["histograms"]) == HISTOGRAM_KEYS - {"revbn/model.bn1/scale"}
    assert np.isnan(accumulator.Scalars("revbn/model.bn1/scale_mean")[0].value)


def test_a_log_of_the_whole_model_alone_has_no_single_layers(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, BatchNormMonitor(per_layer=False, activations=True), logger=logger).fit(LitNet(), loader(2))
    assert {tag for tag in events(logger).Tags()["scalars"] if tag.startswith("revbn/")} == MODEL_KEYS


def test_the_progress_bar_shows_one_short_value_if_asked(tmp_path: Path) -> None:
    for wanted in (False, True):
        run = trainer(tmp_path, BatchNormMonitor(progress_bar=wanted), logger=CSVLogger(tmp_path / str(wanted)))
        run.fit(LitNet(), loader(2))
        shown = {key: value for key, value in run.progress_bar_metrics.items() if key.startswith("revbn/")}
        assert [*shown] == (["revbn/scale_mean"] if wanted else [])
        assert all(len(str(value)) <= 6 for value in shown.values())
        assert all(f"revbn/{key}" in run.callback_metrics for key in ("scale_drift", "shift_drift", "scale_lr"))


def test_callback_metrics_are_tensors_of_the_last_event(tmp_path: Path) -> None:
    run = trainer(tmp_path, BatchNormMonitor(activations=True), logger=CSVLogger(tmp_path / "csv"), log_every_n_steps=2)
    run.fit(LitNet(), loader(2))
    last = reference(tmp_path)[3]
    for key in MODEL_KEYS:
        assert isinstance(run.callback_metrics[key], torch.Tensor)
        assert run.callback_metrics[key].item() == pytest.approx(last[key])
