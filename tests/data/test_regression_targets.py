"""Targets of a regression: standardised for the loss, and predictions brought back, by `key=1` and `denormalize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.lit import trainer
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import InputNorm, OnlineInputNormMixin
from lightning_revbn.core.input_norm import InputError, MissingStatisticsError

TABLE, PROGRESSION = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
PAIR = torch.stack([PROGRESSION, 1e3 - 5 * PROGRESSION], 1)
TARGETS = {"one": PROGRESSION, "a column": PROGRESSION.view(-1, 1), "two": PAIR}
SETTINGS: dict[str, dict[str, Any]] = {
    "one": {"num_features": 1, "channel_dim": None},
    "a column": {"num_features": 1},
    "two": {"num_features": 2},
}


class Data(OnlineInputNormMixin, L.LightningDataModule):
    def __init__(self, targets: Tensor, unknown: bool = False, **settings: Any) -> None:
        super().__init__(input_norm=InputNorm(key=1, scale=1.0, **settings))
        self.targets = targets
        self.unknown = unknown

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(TABLE, self.targets), batch_size=52, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(TABLE, self.targets), batch_size=52)

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> Any:
        targets = torch.full_like(self.targets, torch.nan) if self.unknown else self.targets
        return DataLoader(TensorDataset(TABLE, targets), batch_size=52)


class Regression(L.LightningModule):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.model = nn.Linear(10, outputs)
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        self.spreads: list[float] = []
        self.returned: list[tuple[Tensor, Tensor]] = []

    def forward(self, inputs: Tensor, like: Tensor) -> Tensor:
        return self.model(100 * inputs).view_as(like)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        self.spreads.append(targets.std().item())
        return mse_loss(self(inputs, targets), targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.returned.append((self.data().denormalize(self(*batch)), self.data().denormalize(batch[1])))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.data().denormalize(self(*batch))

    def data(self) -> Data:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


@pytest.mark.parametrize("mode", ["running", "batch", "ema"])
@pytest.mark.parametrize("name", TARGETS)
def test_a_network_learns_standardised_targets_and_predicts_in_the_units_of_the_data(
    name: str, mode: Any, tmp_path: Path
) -> None:
    targets, settings = TARGETS[name], {**SETTINGS[name], "mode": mode}
    outputs = 2 if name == "two" else 1
    network, data = Regression(outputs), Data(targets, **settings)
    run = trainer(tmp_path, max_epochs=15, num_sanity_val_steps=0)
    run.fit(network, data)
    assert all(0.6 < spread < 1.4 for spread in network.spreads)
    statistics = data.input_statistics()
    columns = targets.double().view(len(targets), -1)
    torch.testing.assert_close(statistics.mean, columns.mean(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(statistics.std, columns.std(0, correction=0), rtol=1e-10, atol=0)

    network.returned.clear()
    run.validate(network, data, verbose=False)
    predictions, returned = (torch.cat(parts) for parts in zip(*network.returned, strict=True))
    assert predictions.shape == returned.shape == targets.shape
    torch.testing.assert_close(returned, targets, rtol=1e-5, atol=1e-3)
    error = (predictions - targets).view(len(targets), -1).std(0) / columns.std(0)
    assert (error < 0.85).all()  # a constant prediction has 1, least squares 0.69

    # Another process: a checkpoint, and targets that nobody knows.
    run.save_checkpoint(tmp_path / "end.ckpt")
    other, unknown = Regression(outputs), Data(targets, unknown=True, **settings)
    again = trainer(tmp_path).predict(other, unknown, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert again is not None
    torch.testing.assert_close(torch.cat(again), predictions)


def test_predictions_of_other_shapes_and_their_gradients_come_back(tmp_path: Path) -> None:
    data = Data(PROGRESSION, num_features=1, channel_dim=None, mode="running")
    trainer(tmp_path, max_epochs=1).fit(Regression(1), data)
    mean, std, _ = data.input_statistics()
    for shape in ((), (1,), (7,), (7, 1), (7, 5, 1)):  # one number, a batch, a column, an ensemble
        predictions = torch.ones(shape, requires_grad=True)
        back = data.denormalize(predictions)
        torch.testing.assert_close(back, torch.full(shape, (mean + std).item()))
        back.sum().backward()
        torch.testing.assert_close(predictions.grad, torch.full(shape, std.item()))


def test_a_training_step_gets_the_targets_of_its_own_batch_back(tmp_path: Path) -> None:
    class InUnits(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            rows = (batch[0].unsqueeze(1) == TABLE).all(2).int().argmax(1)
            torch.testing.assert_close(self.data().denormalize(batch[1]), PAIR[rows], rtol=1e-4, atol=1e-2)
            return super().training_step(batch, batch_idx)

    network = InUnits(2)
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(network, Data(PAIR, num_features=2, mode="batch"))
    assert len(network.spreads) == 9


def test_the_sanity_check_gets_its_targets_back_before_anything_is_learned(tmp_path: Path) -> None:
    network, data = Regression(2), Data(PAIR, num_features=2, mode="running")
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=2, limit_train_batches=0, limit_val_batches=2).fit(
        network, data
    )
    assert len(network.returned) == 2
    torch.testing.assert_close(
        torch.cat([returned for _, returned in network.returned]), PAIR[:104], rtol=1e-5, atol=1e-3
    )
    with pytest.raises(MissingStatisticsError):
        data.input_statistics()


def test_targets_without_a_dimension_of_channels_are_told_how_to_be_taken(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shape \(52,\).*InputNorm\(1, channel_dim=None\) takes all values as one"):
        trainer(tmp_path, num_sanity_val_steps=0).fit(Regression(1), Data(PROGRESSION, num_features=1))


def test_an_example_input_is_not_taken_for_targets(tmp_path: Path) -> None:
    class Bytes(Regression):
        def forward(self, inputs: Tensor, like: Tensor | None = None) -> Tensor:
            if like is None:
                self.example_seen = inputs
                return self.model(inputs.float())
            return super().forward(inputs, like)

    network, data = Bytes(1), Data(PROGRESSION, num_features=1, channel_dim=None, mode="running")
    network.example_input_array = torch.full((2, 10), 7, dtype=torch.uint8)
    trainer(tmp_path, enable_model_summary=True, max_epochs=1).fit(network, data)
    assert torch.equal(network.example_seen, network.example_input_array)
