"""Run by test_resumed_runs.py: a run that is resumed on another number of devices, and one of which a rank dies.

The net's batch norm is synchronised by hand and its global batches are the same on any number of ranks, so that every
run must end as the one that was trained on one device without a break.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from helpers.aftermath import Snapshot, assert_nothing_left
from helpers.joined_batch import JoinedNet
from helpers.lit import trainer
from helpers.strategies import values
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_revbn import RevisitedBatchNorm

QUIET = {"use_distributed_sampler": False, "enable_checkpointing": True}


def fit(folder: Path, devices: int, epochs: int, ckpt_path: Path | None = None) -> dict[str, Any]:
    """Train in forked processes, and return what was learned."""
    module = JoinedNet()
    save = ModelCheckpoint(folder, "half")
    options = {"devices": devices, "strategy": "ddp_fork", "max_epochs": epochs, **QUIET}
    trainer(folder, RevisitedBatchNorm(monitor=False), save, **options).fit(module, ckpt_path=ckpt_path)
    return values(module)


def resume_elsewhere(folder: Path) -> None:
    learned = {"undisturbed": fit(folder / "whole", 1, 2)}
    for first, second in ((1, 2), (2, 1)):
        half = folder / f"{first}"
        fit(half, first, 1)
        learned[f"{first} then {second}"] = fit(folder / f"{first}{second}", second, 2, half / "half.ckpt")
    torch.save(learned, folder / "learned.pt")


class Die(Callback):
    """Kills rank 1 in the middle of training."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def lose_a_rank(folder: Path) -> None:
    module = JoinedNet()
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    own = Die(), RevisitedBatchNorm(monitor=False), save
    run = trainer(folder, *own, devices=2, strategy="ddp", **QUIET)
    before = Snapshot(module, run)
    try:
        run.fit(module)  # gloo's connection to the dead rank is closed: the error comes at once, not by a timeout
    except BaseException as error:
        # DDP fails before it calls what Lightning's strategy has put in place of the module's forward.
        redirection = vars(module).pop("forward", None)
        assert redirection is None or redirection.__module__ == "lightning.pytorch.strategies.strategy"
        assert_nothing_left(before)
        (folder / "error.txt").write_text(repr(error))
    os._exit(0)  # what is left of the process group waits for the dead


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"resume": resume_elsewhere, "die": lose_a_rank}[sys.argv[1]](Path(sys.argv[2]))
