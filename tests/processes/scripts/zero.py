"""Run by test_engines.py: ZeroRedundancyOptimizer on two gloo ranks: refused, from permanent groups, in a loop."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from helpers.by_hand import LR, C, sgd_by_hand
from helpers.lit import LitNet, quiet, trainer
from helpers.models import images, residual_net, scales
from helpers.ranks import end_rank
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import ScaleUpdateRule, init_batch_norms, scale_param_groups

OPTIONS: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_epochs": 2}


def sharded(params: Any) -> torch.optim.Optimizer:
    return ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=LR, momentum=0.9, weight_decay=0.01)


def loop(model: nn.Module, optimizer: Any) -> None:
    """Train as every rank of a data parallel run does, with the mean of the ranks' gradients."""
    rank = torch.distributed.get_rank()
    inputs, targets = (part[rank::2] for part in images(64))
    for x, y in zip(inputs.split(8), targets.split(8), strict=True):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
        optimizer.step()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    data = DataLoader(TensorDataset(*images(64)), batch_size=8)
    results: dict[str, Any] = {}

    reference = LitNet(sgd_by_hand)
    for scale in scales(reference):
        nn.init.constant_(scale, 0.1)
    trainer(folder, **OPTIONS).fit(reference, data)
    results["by hand"] = reference.state_dict()

    refused = trainer(folder, quiet(), **OPTIONS)
    try:
        refused.fit(LitNet(lambda module: sharded(module.parameters())), data)
    except MisconfigurationException as error:
        results["refused"] = str(error)
    results["steps of the refused"] = refused.global_step

    def remedy() -> LitNet:
        return LitNet(lambda module: sharded(scale_param_groups(module, LR, 0.01)))

    save = ModelCheckpoint(folder / "saved", "{epoch}", save_top_k=-1)
    run = trainer(folder, quiet(), save, enable_checkpointing=True, **OPTIONS)
    run.fit(module := remedy(), data)
    results["remedy"] = module.state_dict()
    resumed = remedy()
    trainer(folder, quiet(), **OPTIONS).fit(resumed, data, ckpt_path=folder / "saved" / "epoch=0.ckpt")
    results["resumed"] = resumed.state_dict()

    model = residual_net()
    report = init_batch_norms(model)
    hand = copy.deepcopy(model)
    loop(hand, sgd_by_hand(hand))
    optimizer: Any = sharded(model.parameters())
    with ScaleUpdateRule(optimizer.optim, report.scales, C, report.scales, warn_if_unused=False):
        loop(model, optimizer)
    results["loop by hand"], results["loop"] = hand.state_dict(), model.state_dict()

    torch.save(results, folder / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_rank()
