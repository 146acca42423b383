"""BatchNormMonitor(activations=True) in real fits."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lit import LitNet, loader, trainer
from helpers.logs import rows
from helpers.models import BATCH_NORMS, assert_same_parameters, images, residual_net
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm


class Recording(LitNet):
    """Notes |x_hat| of every layer in every forward pass, from the output of a layer whose scale is 1 and shift 0."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.values: dict[str, list[Tensor]] = {name: [] for name in BATCH_NORMS}
        for name in BATCH_NORMS:
            layer = self.model.get_submodule(name)
            layer.weight.requires_grad_(False)
            layer.bias.requires_grad_(False)
            layer.register_forward_hook(
                lambda _, args, output, name=name: self.values[name].append(output.detach().abs().flatten())
            )


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in module.modules())


def assert_logged(path: Path, expected: dict[int, dict[str, Tensor]]) -> None:
    logged = {int(row["step"]): row for row in rows(path)}
    assert logged.keys() == expected.keys()
    for step, layers in expected.items():
        for name, values in [*layers.items(), ("", torch.cat(list(layers.values())))]:
            key = f"revbn/model.{name}/" if name else "revbn/"
            assert float(logged[step][f"{key}normalized_absmax"]) == pytest.approx(values.max().item(), rel=1e-5)
            share = (values > 3).double().mean().item()
            assert float(logged[step][f"{key}normalized_over_3"]) == pytest.approx(share, abs=1e-6)


def test_the_values_of_logging_steps_are_those_of_the_recorded_activations(tmp_path: Path) -> None:
    module = Recording()
    run = trainer(tmp_path, BatchNormMonitor(activations=True), logger=CSVLogger(tmp_path), log_every_n_steps=3)
    run.fit(module, loader(6))
    assert_logged(tmp_path, {step: {n: module.values[n][step] for n in BATCH_NORMS} for step in (2, 5, 8, 11)})


def test_layers_in_evaluation_mode_are_measured_with_their_running_statistics(tmp_path: Path) -> None:
    class Frozen(Recording):
        def on_train_epoch_start(self) -> None:
            self.model.eval()

    module = Frozen()
    residual = module.model
    residual(images(32, seed=5)[0] * 3)
    for values in module.values.values():
        values.clear()
    trainer(tmp_path, BatchNormMonitor(activations=True), logger=CSVLogger(tmp_path)).fit(module, loader(3))
    assert_logged(tmp_path, {step: {n: module.values[n][step] for n in BATCH_NORMS} for step in range(6)})


def test_all_batches_that_are_accumulated_in_a_step_count(tmp_path: Path) -> None:
    module = Recording()
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 2}
    run = trainer(tmp_path, BatchNormMonitor(activations=True), logger=CSVLogger(tmp_path), **options)
    run.fit(module, loader(6))  # steps 1 and 3 are logged, of 6
    batches = {1: (2, 3), 3: (6, 7), 5: (10, 11)}
    expected = {
        step: {name: torch.cat([module.values[name][batch] for batch in pair]) for name in BATCH_NORMS}
        for step, pair in batches.items()
    }
    assert_logged(tmp_path, expected)


def test_validation_between_accumulated_batches_does_not_count(tmp_path: Path) -> None:
    class Validating(Recording):
        def on_validation_start(self) -> None:
            assert hooks(self) == len(BATCH_NORMS)  # its own alone
            self.kept = {name: list(values) for name, values in self.values.items()}

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.model(batch[0] * 100)

        def on_validation_end(self) -> None:
            self.values.update(self.kept)

    module = Validating()
    options = {"accumulate_grad_batches": 2, "val_check_interval": 1, "num_sanity_val_steps": 0, "max_epochs": 1}
    run = trainer(tmp_path, BatchNormMonitor(activations=True), logger=CSVLogger(tmp_path), **options)
    run.fit(module, loader(4), loader(1))
    pairs = {0: (0, 1), 1: (2, 3)}
    assert_logged(
        tmp_path,
        {s: {n: torch.cat([module.values[n][i] for i in pair]) for n in BATCH_NORMS} for s, pair in pairs.items()},
    )


@pytest.mark.filterwarnings("ignore:RevisitedBatchNorm. 3 scales are torch.bfloat16:UserWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_run_is_the_same_to_the_bit(tmp_path: Path, precision: Any) -> None:
    plain, watched = LitNet(), LitNet()
    trainer(tmp_path, RevisitedBatchNorm(monitor=False), precision=precision).fit(plain, loader())
    callback = RevisitedBatchNorm(monitor=BatchNormMonitor(activations=True))
    trainer(tmp_path, callback, precision=precision, logger=CSVLogger(tmp_path)).fit(watched, loader())
    assert_same_parameters(plain, watched)
    assert all(float(row["revbn/normalized_absmax"]) > 1 for row in rows(tmp_path))


@pytest.mark.parametrize("start", ["zero", "no scale"])
def test_layers_with_scale_0_or_without_a_scale_are_measured_alike(tmp_path: Path, start: str) -> None:
    model = residual_net()
    if start == "zero":
        nn.init.zeros_(model.bn2.weight)
    else:
        model.bn2 = nn.BatchNorm2d(6, affine=False)
    for name, net in (("normal", residual_net()), ("special", model)):
        run = trainer(tmp_path, BatchNormMonitor(activations=True), logger=CSVLogger(tmp_path / name), max_epochs=1)
        run.fit(LitNet(model=net), loader(1))
    normal, special = rows(tmp_path / "normal"), rows(tmp_path / "special")
    for key in ("absmax", "over_3"):
        assert special[0][f"revbn/model.bn2/normalized_{key}"] == normal[0][f"revbn/model.bn2/normalized_{key}"]
    assert ("revbn/model.bn2/scale_mean" in special[0]) == (start == "zero")


def test_hooks_are_there_only_while_a_logging_step_runs(tmp_path: Path) -> None:
    counts: list[int] = []

    class Counting(LitNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            counts.append(hooks(self.model))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            counts.append(100 + hooks(self.model))

    module = Counting()
    run = trainer(tmp_path, BatchNormMonitor(activations=True), logger=CSVLogger(tmp_path), log_every_n_steps=3)
    run.fit(module, loader(3), loader(1))
    assert counts == [100, *([0, 0, 3, 100] * 2)]
    assert hooks(module) == 0


def test_after_an_exception_no_hook_stays(tmp_path: Path) -> None:
    class Failing(LitNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.model(batch[0])
            raise RuntimeError("the user's own")

    for callback in (
        BatchNormMonitor(activations=True),
        RevisitedBatchNorm(monitor=BatchNormMonitor(activations=True)),
    ):
        module = Failing()
        with pytest.raises(RuntimeError, match="the user's own"):
            trainer(tmp_path, callback, logger=CSVLogger(tmp_path)).fit(module, loader(1))
        assert hooks(module) == 0


def test_a_skipped_batch_leaves_its_event_to_the_next_one_or_to_the_end(tmp_path: Path) -> None:
    class Skipping(LitNet):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

        def on_train_epoch_end(self) -> None:
            assert hooks(self) == 0

    run = trainer(tmp_path, BatchNormMonitor(activations=True), logger=CSVLogger(tmp_path))
    run.fit(Skipping(), loader(6))
    assert [int(row["step"]) for row in rows(tmp_path)] == [0, 1, 2, 3, 4]
    assert ["revbn/normalized_absmax" in row for row in rows(tmp_path)] == [True, True, True, True, False]


def test_layers_that_a_step_does_not_use_have_no_activations_in_it(tmp_path: Path) -> None:
    module = LitNet()
    module.unused = nn.BatchNorm1d(3)
    run = trainer(tmp_path, BatchNormMonitor(activations=True), logger=CSVLogger(tmp_path), max_epochs=1)
    run.fit(module, loader(1))
    (row,) = rows(tmp_path)
    assert "revbn/unused/scale_mean" in row
    assert "revbn/unused/normalized_absmax" not in row
    assert "revbn/model.bn1/normalized_absmax" in row


def test_a_network_inside_torch_compile_trains_on_and_is_warned_about_once(tmp_path: Path) -> None:
    module = LitNet()
    module.model.compile(backend="eager")
    monitor = BatchNormMonitor(activations=True)
    with pytest.warns(UserWarning, match="layers inside torch.compile") as told:
        trainer(tmp_path, monitor, logger=CSVLogger(tmp_path)).fit(module, loader(2))
    assert len([warning for warning in told if "torch.compile" in str(warning.message)]) == 1
    assert len(rows(tmp_path)) == 4
    assert not {key for row in rows(tmp_path) for key in row if "normalized" in key}


def test_lazy_layers_are_measured_from_the_first_logging_step_after_they_were_made(tmp_path: Path) -> None:
    model = residual_net()
    model.bn1 = nn.LazyBatchNorm2d()
    run = trainer(tmp_path, RevisitedBatchNorm(monitor=BatchNormMonitor(activations=True)), logger=CSVLogger(tmp_path))
    module = LitNet(lambda net: torch.optim.SGD(net.parameters(), 0.1), model=model)
    run.fit(module, loader(2))
    assert [int(row["step"]) for row in rows(tmp_path)] == [1, 2, 3]
    assert all("revbn/model.bn1/normalized_absmax" in row for row in rows(tmp_path))


def test_a_resumed_run_logs_what_the_undisturbed_one_does(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    monitor = BatchNormMonitor(activations=True)
    whole = trainer(tmp_path, monitor, save, enable_checkpointing=True, logger=CSVLogger(tmp_path / "whole"))
    whole.fit(LitNet(), loader(3))
    resumed = trainer(tmp_path, BatchNormMonitor(activations=True), logger=CSVLogger(tmp_path / "resumed"))
    resumed.fit(LitNet(), loader(3), ckpt_path=tmp_path / "saved" / "step=2.ckpt")
    assert rows(tmp_path / "whole")[2:] == rows(tmp_path / "resumed")


def test_several_fits_with_one_monitor(tmp_path: Path) -> None:
    monitor = BatchNormMonitor(activations=True)
    for name in "12":
        trainer(tmp_path, monitor, logger=CSVLogger(tmp_path / name)).fit(LitNet(), loader(2))
    assert rows(tmp_path / "1") == rows(tmp_path / "2")


def test_the_monitor_can_be_pickled_in_the_middle_of_a_logging_step(tmp_path: Path) -> None:
    monitor = BatchNormMonitor(activations=True, histograms=True, prefix="bn")
    copies: list[BatchNormMonitor] = []

    class Pickling(Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            copies.append(pickle.loads(pickle.dumps(monitor)))

    with pytest.warns(UserWarning, match="histograms need"):
        trainer(tmp_path, monitor, Pickling(), logger=CSVLogger(tmp_path)).fit(LitNet(), loader(1))
    assert copies[0].activations
    assert copies[0].prefix == "bn"
    assert copies[0].state_dict().keys() == monitor.state_dict().keys()
    assert copies[0]._fit is None  # neither the network nor its hooks went along
