"""Run by test_shared_device.py: two ranks that share one device by gloo, and FSDP2 on one device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from helpers.by_hand import LR
from helpers.devices import ACCELERATOR
from helpers.lit import LitNet, loader, trainer
from helpers.models import residual_net, scales, shifts
from helpers.ranks import end_rank, join_process_group
from helpers.raw import raw_images
from helpers.strategies import ShardedNet, strategy_of, values
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lightning_revbn import InputNorm, RevisitedBatchNorm, ScaleUpdateRule
from lightning_revbn.core.batch_norm_sync import synchronize_batch_norms
from lightning_revbn.core.input_norm import OnlineStandardizer

STEPS, GLOBAL_BATCH = 5, 16
SYNCHRONISED = {"BatchNormSync": synchronize_batch_norms, "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm}
"""Ways to synchronise; torch's own is for GPUs alone."""


def train(device: str, rank: int, ranks: int, kind: str) -> dict[str, Any]:
    """Train on raw images, every rank on its part of each global batch; return what was learned and measured."""
    images, targets = (tensor.to(device) for tensor in raw_images(STEPS * GLOBAL_BATCH))
    model = residual_net().double()  # so that sums in another order do not matter
    if ranks > 1:
        model = SYNCHRONISED[kind](model)
    model = model.to(device)
    network = DistributedDataParallel(model, [0] if device == "cuda" else None) if ranks > 1 else model
    online = OnlineStandardizer(InputNorm(3))
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=0.01)
    with ScaleUpdateRule(optimizer, scales(model), 100.0, scales(model), shifts=shifts(model), shift_multiplier=10.0):
        for batch, labels in zip(images.split(GLOBAL_BATCH), targets.split(GLOBAL_BATCH), strict=True):
            part = slice(rank, None, ranks)
            inputs = online.train(batch[part], dtype=torch.float64, ranks=ranks)
            optimizer.zero_grad()
            cross_entropy(network(inputs), labels[part]).backward()
            optimizer.step()
    statistics = online.statistics()
    return {
        "parameters": {name: value.cpu() for name, value in model.state_dict().items()},
        "mean": statistics.mean,
        "std": statistics.std,
        "count": statistics.count,
    }


def worker(rank: int, device: str, folder: Path) -> None:
    torch.set_num_threads(1)
    join_process_group(rank, 2, folder)
    kinds = SYNCHRONISED if device == "cuda" else ["BatchNormSync"]
    torch.save({kind: train(device, rank, 2, kind) for kind in kinds}, folder / f"rank{rank}.pt")
    end_rank()


def share(device: str, folder: Path) -> None:
    torch.save(train(device, 0, 1, ""), folder / "alone.pt")
    torch.multiprocessing.spawn(worker, (device, folder), nprocs=2)


def shard(device: str, folder: Path) -> None:
    """Train sharded parameters, and whole parameters, on one device."""
    learned: dict[str, Any] = {}
    for name, module in {"fsdp2": ShardedNet(), "auto": LitNet()}.items():
        callback = RevisitedBatchNorm(monitor=False, shift_lr_multiplier=10.0)
        options = {"accelerator": ACCELERATOR[device], "devices": 1, "strategy": strategy_of(name, 1)}
        trainer(folder, callback, **options).fit(module, loader())
        learned[name] = {key: value.cpu() for key, value in values(module).items()}
    torch.save(learned, folder / "learned.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"share": share, "shard": shard}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
    end_rank()
