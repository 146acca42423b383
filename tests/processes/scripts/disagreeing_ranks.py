"""Run by test_disagreeing_ranks.py: two gloo ranks with different settings each write down how their fit ends."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from helpers.lit import LitNet, quiet, trainer
from helpers.models import images, scales
from helpers.raw import RawData, SeeingNet
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import BatchNormMonitor, InputNorm, RevisitedBatchNorm
from lightning_revbn.switches import environment
from lightning_revbn.switches.environment import VARIABLE

CALLBACKS: dict[str, Any] = {
    "variable": lambda rank: [],
    "callback": lambda rank: [quiet()] if rank == 0 else [],
    "scale": lambda rank: [quiet(scale=[0.1, 0.2][rank])],
    "enabled": lambda rank: [quiet(enabled=rank == 0)],
    "activations": lambda rank: [RevisitedBatchNorm(monitor=BatchNormMonitor(activations=rank == 1))],
    "monitor": lambda rank: [BatchNormMonitor(activations=True)] if rank == 1 else [],
}
INPUT_NORMS: dict[str, Any] = {
    "input eps": lambda rank: InputNorm(3, eps=[1e-5, 1e-3][rank]),
    "input mode": lambda rank: [InputNorm(3), InputNorm(3, mode="fixed", mean=[0.5] * 3, std=[0.25] * 3)][rank],
}


class Clock(Callback):
    """Starts when the ranks can communicate."""

    start = math.nan

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.start = time.monotonic()


def main(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    # The first rank is the process that Lightning starts the others from, with a variable of their own each.
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if case == "variable":
        os.environ[VARIABLE] = "1" if rank == 1 else "0"
    data: Any = DataLoader(TensorDataset(*images(32)), batch_size=8)
    module = LitNet()
    if case in INPUT_NORMS:
        data, module = RawData(INPUT_NORMS[case](rank)), SeeingNet()
    clock, own, added = Clock(), CALLBACKS.get(case, lambda rank: [])(rank), environment.callbacks()
    run = trainer(folder, clock, *own, *added, devices=2, strategy="ddp", max_epochs=1)
    error = ""
    try:
        run.fit(module, data)
    except BaseException as raised:  # gloo raises a RuntimeError where the other rank has gone
        error = f"{type(raised).__name__}: {raised}"
    end = {"error": error, "seconds": time.monotonic() - clock.start, "scales": torch.cat(scales(module)).detach()}
    torch.save(end, folder / f"rank{rank}.pt")
    os._exit(0)  # a rank that has failed ends, and the other learns of it as it does without this script


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
