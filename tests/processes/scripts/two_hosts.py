"""Run by test_two_hosts.py: a rank of two hosts, or one process with the joined batch.

Every part of the package that ranks share takes part: rule, monitor, input statistics and synchronised layers.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from helpers.lit import Batches, LitNet, trainer
from helpers.models import residual_net
from helpers.ranks import end_rank
from helpers.raw import raw_images
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_revbn import BatchNormMonitor, InputNorm, OnlineInputNormMixin, RevisitedBatchNorm
from lightning_revbn.plugins import BatchNormSync

GLOBAL_BATCH = 16
STEPS = 8
DIES_AT = 3
TIMEOUT = timedelta(seconds=20)
RANK, RANKS, HOST = (int(os.environ.get(name, default)) for name, default in
                     (("RANK", "0"), ("WORLD_SIZE", "1"), ("GROUP_RANK", "0")))  # fmt: skip


class JoinedData(OnlineInputNormMixin, L.LightningDataModule):
    """This rank's part of the same global batches of raw values, whatever the number of ranks."""

    def __init__(self) -> None:
        super().__init__(input_norm=InputNorm(num_features=3, input_range=255.0))

    def train_dataloader(self) -> Batches:
        inputs, targets = raw_images(STEPS // 2 * GLOBAL_BATCH)
        inputs = inputs.double()
        inputs[::3] *= 2  # ranks differ
        part = slice(RANK, None, RANKS)
        return Batches(inputs[part], targets[part], GLOBAL_BATCH // RANKS)


class Net(LitNet):
    def __init__(self) -> None:
        super().__init__(model=residual_net().double())


class StopAmidAStep(Net):
    """Waits on the second host between forward and backward, while the first host waits for its gradients."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if HOST == 1 and batch_idx == DIES_AT:
            (self.folder / f"stopped{RANK}").touch()
            time.sleep(3600)  # the test kills the host
        return loss


class Clock(Callback):
    """Notes when this rank's setup began."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        (self.folder / f"setup{trainer.global_rank}").write_text(str(time.time()))


def run(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    if RANKS > 1:
        strategy = DDPStrategy(timeout=TIMEOUT)
        options |= {"devices": 2, "num_nodes": RANKS // 2, "strategy": strategy, "plugins": [BatchNormSync()]}
    return trainer(folder, *callbacks, use_distributed_sampler=False, precision="64-true", **options)


def fit(folder: Path, module: LitNet | None = None, ckpt_path: Path | None = None) -> None:
    """Train with all parts, and save what this rank has learned."""
    module, data = module or Net(), JoinedData()
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    monitor = BatchNormMonitor(activations=True)
    options = {"logger": CSVLogger(folder, ""), "enable_checkpointing": True}
    run(folder, RevisitedBatchNorm(monitor=monitor), save, **options).fit(module, data, ckpt_path=ckpt_path)
    learned = {"values": module.state_dict(), "input": data.state_dict()["input_norm"]}
    torch.save(learned, folder / f"rank{RANK}.pt")


def main(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True, parents=True)
    if case == "variable":  # the callback is in the environment, or not
        run(folder, Clock(folder), max_epochs=1).fit(Net(), JoinedData())
    else:
        fit(folder, StopAmidAStep(folder) if case == "stop" else None, *map(Path, sys.argv[3:]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    end_rank()
