"""Run by tests/switches/test_environment.py: a script that does not know of the callback, on two gloo ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from helpers.lit import LitNet, loader, trainer
from helpers.models import scales
from helpers.ranks import end_rank


class Net(LitNet):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            torch.save([scale.detach() for scale in scales(self)], self.folder / f"rank{self.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    trainer(place, devices=2, strategy="ddp", max_epochs=1).fit(Net(place), loader())
    end_rank()
