"""Run by gpu/test_gpu.py, one strategy a process tree: the callback on two GPUs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from helpers.lit import LitNet, trainer
from helpers.models import images
from helpers.ranks import end_rank
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import RevisitedBatchNorm, scale_param_groups


def permanent(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(scale_param_groups(module, lr=0.05, weight_decay=0.01), momentum=0.9)


def main(strategy: str, folder: Path) -> None:
    module = LitNet(permanent) if strategy.startswith("deepspeed") else LitNet()
    options = {"accelerator": "gpu", "devices": 2, "strategy": strategy}
    run = trainer(folder, RevisitedBatchNorm(), logger=CSVLogger(folder), **options)
    run.fit(module, DataLoader(TensorDataset(*images(64)), batch_size=8))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    end_rank()
