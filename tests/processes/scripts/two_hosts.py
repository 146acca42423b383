"""Run by test_two_hosts.py: a rank of two hosts, or one process with the joined batch."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from helpers.joined_raw import JoinedRawNet, callback, train_raw
from helpers.ranks import end_rank
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_revbn.plugins import BatchNormSync

DIES_AT = 3
TIMEOUT = timedelta(seconds=20)
RANK, RANKS, HOST = (
    int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("GROUP_RANK", "0"))
)


class StopAmidAStep(JoinedRawNet):
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


def main(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True, parents=True)
    options: dict[str, Any] = {}
    if RANKS > 1:
        strategy = DDPStrategy(timeout=TIMEOUT)
        options = {"devices": 2, "num_nodes": RANKS // 2, "strategy": strategy, "plugins": [BatchNormSync()]}
    if case == "variable":  # the callback is in the environment, or not
        train_raw(folder, Clock(folder), max_epochs=1, **options)
        return
    if case == "stop":
        options["module"] = StopAmidAStep(folder)
    if len(sys.argv) > 3:
        options["ckpt_path"] = Path(sys.argv[3])
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    train_raw(folder, callback(), save, enable_checkpointing=True, **options)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    end_rank()
