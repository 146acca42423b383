"""Run by test_data_parallel.py, one strategy a process tree: the callback, and the same by hand, on two gloo ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from helpers.by_hand import LR, by_hand
from helpers.lit import LitNet, trainer
from helpers.models import BATCH_NORMS, images, scales
from helpers.ranks import end_rank
from helpers.strategies import ShardedNet, strategy_of, values
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm

EPS, MULTIPLIER = 1e-3, 10.0


def sgd_by_hand(module: nn.Module) -> Optimizer:
    return torch.optim.SGD(by_hand(module, multiplier=MULTIPLIER), LR, momentum=0.9)


def revisited(monitor: bool | BatchNormMonitor = True) -> RevisitedBatchNorm:
    return RevisitedBatchNorm(shift_lr_multiplier=MULTIPLIER, eps=EPS, monitor=monitor)


def main(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    data = DataLoader(TensorDataset(*images(64)), batch_size=8)
    # Lightning puts its own sampler in place, shuffled by epoch and the same in all runs.

    def options() -> dict[str, Any]:
        return {"devices": 2, "strategy": strategy_of(name, 2), "max_epochs": 2}

    network = ShardedNet if name == "fsdp2" else LitNet
    reference = network(sgd_by_hand)
    for scale in scales(reference):
        nn.init.constant_(scale, 0.1)
    for layer in BATCH_NORMS:
        reference.get_submodule(f"model.{layer}").eps = EPS
    trainer(folder, **options()).fit(reference, data)
    states = {"by hand": values(reference)}

    module = network()
    save = ModelCheckpoint(folder / "saved", "{epoch}", save_top_k=-1)
    logger = CSVLogger(folder)
    callback = revisited(BatchNormMonitor(activations=True))
    run = trainer(folder, callback, save, logger=logger, enable_checkpointing=True, **options())
    run.fit(module, data)
    states["callback"] = values(module)

    resumed = network()
    again = trainer(folder, revisited(), logger=CSVLogger(folder, name="resumed"), **options())
    again.fit(resumed, data, ckpt_path=folder / "saved" / "epoch=0.ckpt")
    states["resumed"] = values(resumed)

    if run.is_global_zero:
        torch.save(states, folder / "result.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    end_rank()
