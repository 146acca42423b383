"""Run by test_processes.py: the callback on several ranks, for a net whose batch norm is synchronised by hand."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from helpers.lit import Batches, LitNet, trainer
from helpers.models import SynchronizedBatchNorm, images, residual_net_of
from helpers.ranks import end_rank
from helpers.sharded import Sharding, strategy_of, values
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_revbn import RevisitedBatchNorm

GLOBAL_BATCH = 16


class JoinedNet(LitNet):
    """Trains in float64, where sums in another order do not matter, on every rank's part of the global batches."""

    def __init__(self, kind: type[nn.Module] = SynchronizedBatchNorm) -> None:
        super().__init__(model=residual_net_of(kind).double())

    def train_dataloader(self) -> Batches:
        inputs, targets = images(4 * GLOBAL_BATCH)
        part = slice(self.trainer.global_rank, None, self.trainer.world_size)
        return Batches(inputs.double()[part], targets[part], GLOBAL_BATCH // self.trainer.world_size)


class ShardedJoinedNet(Sharding, JoinedNet):
    pass


def train(module: JoinedNet, folder: Path, name: str, ranks: int) -> dict[str, torch.Tensor]:
    """Return what was learned, on every rank."""
    options = {"devices": ranks, "strategy": strategy_of(name, ranks), "use_distributed_sampler": False}
    trainer(folder, RevisitedBatchNorm(), logger=CSVLogger(folder), **options).fit(module)
    return values(module)


def main(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    network = ShardedJoinedNet if name == "fsdp2" else JoinedNet
    for kind in (SynchronizedBatchNorm, nn.BatchNorm2d):
        learned = train(module := network(kind), folder / kind.__name__, name, 2)
        torch.save(learned, folder / kind.__name__ / f"rank{module.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    end_rank()
