"""Run by test_input_norm_processes.py: raw data in uneven and empty parts on several ranks, through every stage."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from helpers.lit import trainer
from helpers.ranks import end_rank
from helpers.raw import UnevenData, UnevenNet, raw_images
from helpers.strategies import Sharding, strategy_of
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_revbn import InputNorm


class ShardedUnevenNet(Sharding, UnevenNet):
    pass


class Save(Callback):
    """Saves what was learned and seen, from within the processes that did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        parameters = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value.detach()
            for name, value in pl_module.named_parameters()
        }
        data = trainer.datamodule
        learned = {
            "parameters": parameters,
            "state": data.state_dict()["input_norm"],
            "seen": pl_module.seen["train"],
            "collectives": dict(data.collectives),
        }
        torch.save(learned, self.folder / f"rank{trainer.global_rank}.pt")


def main(strategy: str, ranks: int, mode: str, kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    images, labels = raw_images(40)
    inputs = images.float() * 1.7 + 1e4 if kind == "float" else images
    data = UnevenData(ranks, InputNorm(num_features=3, mode=mode), (inputs, labels))  # type: ignore[arg-type]
    if strategy == "ddp_spawn":
        data = copy.deepcopy(data)
    elif strategy == "ddp_fork":
        data = pickle.loads(pickle.dumps(data))
    network = ShardedUnevenNet() if strategy == "fsdp2" else UnevenNet()
    options = {
        "devices": ranks,
        "strategy": strategy_of(strategy, ranks),
        "max_epochs": 2,
        "num_sanity_val_steps": 1,
        "use_distributed_sampler": False,
        "enable_checkpointing": True,
    }
    loggers: list[Any] = [CSVLogger(folder)]
    if strategy == "ddp":  # the graph is drawn by rank 0 alone, from an example that passes the hook
        network.example_input_array = inputs[:2]
        loggers.append(TensorBoardLogger(folder, log_graph=True))
    run = trainer(folder, Save(folder), logger=loggers, **options)
    run.fit(network, data)
    if strategy in ("ddp_spawn", "ddp_fork"):  # the processes that learned are gone
        torch.save(data.state_dict()["input_norm"], folder / "home.pt")
    run.validate(network, data, verbose=False)
    run.test(network, data, verbose=False)
    run.predict(network, data, return_predictions=False)
    if strategy not in ("ddp_spawn", "ddp_fork"):
        torch.save(data.collectives, folder / f"collectives{run.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], Path(sys.argv[5]))
    end_rank()
