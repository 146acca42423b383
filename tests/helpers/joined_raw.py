"""Trains on raw data with all that ranks share: rule, monitor, input statistics, synchronised layers; and compares.

The training is in float64 and learns the same on any number of ranks, since the ranks share every global batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

from helpers.lit import Batches, LitNet, trainer
from helpers.logs import logged_in
from helpers.models import residual_net
from helpers.raw import raw_images
from lightning_revbn import BatchNormMonitor, InputNorm, OnlineInputNormMixin, RevisitedBatchNorm

GLOBAL_BATCH = 16
STEPS = 8


class JoinedData(OnlineInputNormMixin, L.LightningDataModule):
    """This rank's part of the global batches of raw values."""

    def __init__(self) -> None:
        super().__init__(input_norm=InputNorm(num_features=3, input_range=255.0))

    def train_dataloader(self) -> Batches:
        assert self.trainer is not None
        inputs, targets = raw_images(STEPS // 2 * GLOBAL_BATCH)
        inputs = inputs.double()
        inputs[::3] *= 2  # ranks differ
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return Batches(inputs[rank::ranks], targets[rank::ranks], GLOBAL_BATCH // ranks)


class JoinedRawNet(LitNet):
    def __init__(self) -> None:
        super().__init__(model=residual_net().double())


class SaveLearned(Callback):
    """Saves the learned values of every rank, sharded parameters gathered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        sharded = isinstance(trainer.strategy.model, FullyShardedDataParallel)
        values = whole_state(trainer.strategy.model) if sharded else pl_module.state_dict()
        learned = {"values": values, "input": trainer.datamodule.state_dict()["input_norm"]}
        torch.save(learned, self.folder / f"rank{trainer.global_rank}.pt")


def whole_state(model: FullyShardedDataParallel) -> dict[str, Tensor]:
    """Return the state of a model under FSDP1 on every rank, gathered."""
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        return {key: value.clone() for key, value in model.state_dict().items()}


def train_raw(
    folder: Path,
    *callbacks: Callback,
    module: JoinedRawNet | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> None:
    """Train in float64, and save the learned values of this rank as `rank<number>.pt`."""
    defaults = {"precision": "64-true", "use_distributed_sampler": False, "logger": CSVLogger(folder, "")}
    run = trainer(folder, *callbacks, SaveLearned(folder), **{**defaults, **options})
    run.fit(module or JoinedRawNet(), JoinedData(), ckpt_path=ckpt_path)


def callback() -> RevisitedBatchNorm:
    return RevisitedBatchNorm(monitor=BatchNormMonitor(activations=True))


def assert_learned_the_same(folder: Path, reference: Path, ranks: int) -> None:
    """Assert that all ranks have learned what one process has."""
    expected = torch.load(reference / "rank0.pt", weights_only=True)
    for rank in range(ranks):
        learned = torch.load(folder / f"rank{rank}.pt", weights_only=True)
        for part in ("values", "input"):
            assert learned[part].keys() == expected[part].keys()
            for key, value in expected[part].items():
                if isinstance(value, Tensor):
                    message = f"rank {rank}: {part}: {key}"
                    torch.testing.assert_close(learned[part][key], value, rtol=1e-10, atol=1e-12, msg=message)
                else:
                    assert learned[part][key] == value


def assert_logged_the_same(folder: Path, reference: Path) -> None:
    """Assert that the monitor has logged in all steps what it has in one process."""
    ours, theirs = (
        [{key: float(value) for key, value in row.items()} for row in logged_in(of)] for of in (folder, reference)
    )
    assert len(ours) == len(theirs) == STEPS
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-9)  # the CSV file has float32
    assert theirs[-1]["revbn/model.bn1/normalized_absmax"] > 1
