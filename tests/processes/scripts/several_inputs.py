"""Run by test_input_norm_processes.py: three inputs of different kinds on several ranks, collected and trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from helpers.lit import trainer
from helpers.ranks import end_rank
from helpers.sensors import Sensors, SensorsNet
from helpers.strategies import strategy_of


def main(ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    data, network = Sensors(ranks), SensorsNet()
    options: dict[str, Any] = {"devices": ranks, "strategy": strategy_of("ddp", ranks), "max_epochs": 2}
    run = trainer(folder, limit_val_batches=0, use_distributed_sampler=False, **options)
    run.fit(network, data)
    saved = {
        "collected": data.collected,
        "state": data.state_dict()["input_norm"],
        "seen": network.seen,
        "collectives": data.collectives,
    }
    torch.save(saved, folder / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    end_rank()
