"""A network that learns the same on any number of ranks.

Its batch norm layers are synchronised by hand, and the ranks share every global batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from helpers.lit import Batches, LitNet, trainer
from helpers.models import SynchronizedBatchNorm, images, residual_net_of
from helpers.strategies import Sharding, strategy_of, values
from lightning_revbn import RevisitedBatchNorm

GLOBAL_BATCH = 16


class JoinedNet(LitNet):
    """Trains on every rank's part of the global batches, in float64: there the order of sums does not matter."""

    def __init__(self, kind: type[nn.Module] = SynchronizedBatchNorm) -> None:
        super().__init__(model=residual_net_of(kind).double())

    def train_dataloader(self) -> Batches:
        inputs, targets = images(4 * GLOBAL_BATCH)
        part = slice(self.trainer.global_rank, None, self.trainer.world_size)
        return Batches(inputs.double()[part], targets[part], GLOBAL_BATCH // self.trainer.world_size)


class ShardedJoinedNet(Sharding, JoinedNet):
    pass


def train_joined(module: JoinedNet, folder: Path, strategy: str, ranks: int) -> dict[str, torch.Tensor]:
    """Train with the callback, and return the learned values on every rank."""
    options = {"devices": ranks, "strategy": strategy_of(strategy, ranks), "use_distributed_sampler": False}
    trainer(folder, RevisitedBatchNorm(), logger=CSVLogger(folder), **options).fit(module)
    return values(module)
