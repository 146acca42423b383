"""Run by test_batch_norm_sync_processes.py: the same training on one rank and two, synchronised and not."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from helpers.lit import LitNet, trainer
from helpers.models import images
from helpers.ranks import end_rank
from helpers.strategies import ShardedNet, strategy_of, values
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_revbn import RevisitedBatchNorm
from lightning_revbn.core.batch_norm_sync import synchronize_batch_norms
from lightning_revbn.plugins import BatchNormSync

GLOBAL_BATCH = 16


class Watch(Callback):
    """Notes what the model is while it trains, and what a checkpoint holds."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["classes"] = [type(module).__name__ for module in pl_module.modules()]
        self.seen["own forward"] = ["forward" in vars(module) for module in pl_module.model]
        self.seen["keys"] = list(trainer._checkpoint_connector.dump_checkpoint()["state_dict"])


def network() -> LitNet:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), BatchNormAct2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()]
    return LitNet(model=nn.Sequential(*layers, nn.Linear(24, 5)).double())


class Synchronized(ShardedNet):
    """Synchronises its layers before it shards its parameters; Lightning applies no plugin under FSDP2."""

    def configure_model(self) -> None:
        synchronize_batch_norms(self.model)
        super().configure_model()


def main(strategy: str, devices: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that sums in another order do not matter
    inputs, targets = images(64)
    inputs = inputs.double()
    inputs[::2] *= 4  # ranks differ
    data = TensorDataset(inputs, targets)
    # Lightning's own sampler would shuffle.
    sampler = DistributedSampler(data, devices, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
    batches = DataLoader(data, batch_size=GLOBAL_BATCH // devices, sampler=sampler)
    options: dict[str, Any] = {
        "devices": devices,
        "strategy": strategy_of(strategy, devices),
        "use_distributed_sampler": False,
    }
    results: dict[str, Any] = {}
    if strategy == "fsdp2":
        module = Synchronized(model=network().model)
        trainer(folder, RevisitedBatchNorm(monitor=False), **options).fit(module, batches)
        results["synchronised"] = values(module)
        save(results, folder)
        return
    if strategy == "ddp":
        try:
            trainer(folder, RevisitedBatchNorm(), sync_batchnorm=True, **options).fit(network(), batches)
        except MisconfigurationException as error:
            results["refusal"] = str(error)
    for name, plugins in {"synchronised": [BatchNormSync()], "rank by rank": []}.items():
        module, watch = network(), Watch()
        before = [type(layer) for layer in module.modules()]
        run = trainer(folder, RevisitedBatchNorm(monitor=False), watch, plugins=plugins, **options)
        run.fit(module, batches)
        results[name] = module.state_dict()
        results[f"{name}, while training"] = watch.seen
        results[f"{name}, afterwards"] = {
            "same classes": [type(layer) for layer in module.modules()] == before,
            "own forward": ["forward" in vars(layer) for layer in module.model],
        }
    save(results, folder)


def save(results: dict[str, Any], folder: Path) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        folder.mkdir(exist_ok=True)
        torch.save(results, folder / "result.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    end_rank()
