"""Run by test_data_parallel.py: the callback on several ranks, for a net whose batch norm is synchronised by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from helpers.joined_batch import JoinedNet, ShardedJoinedNet, train_joined
from helpers.models import SynchronizedBatchNorm
from helpers.ranks import end_rank
from torch import nn


def main(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    network = ShardedJoinedNet if name == "fsdp2" else JoinedNet
    for kind in (SynchronizedBatchNorm, nn.BatchNorm2d):
        learned = train_joined(module := network(kind), folder / kind.__name__, name, 2)
        torch.save(learned, folder / kind.__name__ / f"rank{module.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    end_rank()
