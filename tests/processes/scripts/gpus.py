"""Run by tests/gpu/test_gpu.py, one strategy a process tree: the callback on two GPUs."""

from __future__ import annotations

import sys
from pathlib import Path

from helpers.lit import LitNet, permanent_sgd, trainer
from helpers.models import images
from helpers.ranks import end_rank
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import RevisitedBatchNorm


def main(strategy: str, folder: Path) -> None:
    module = LitNet(permanent_sgd) if strategy.startswith("deepspeed") else LitNet()
    options = {"accelerator": "gpu", "devices": 2, "strategy": strategy}
    run = trainer(folder, RevisitedBatchNorm(), logger=CSVLogger(folder), **options)
    run.fit(module, DataLoader(TensorDataset(*images(64)), batch_size=8))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    end_rank()
