"""Run by test_input_norm_processes.py: InputBatchNorm on several ranks, against BatchNorm2d with the joined batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from helpers.lit import LitNet, trainer
from helpers.ranks import end_rank, join_process_group
from helpers.raw import Collectives, raw_images
from helpers.strategies import strategy_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import InputBatchNorm
from lightning_revbn.core.batch_norm_sync import synchronize_batch_norms


def step(layer: nn.Module, inputs: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Run a training step, and return everything that came of it."""
    inputs = inputs.clone().requires_grad_(inputs.is_floating_point())
    output = layer(inputs)
    (output * upstream).sum().backward()
    weight_grad = layer.weight.grad.clone()
    if torch.distributed.is_initialized() and isinstance(layer, InputBatchNorm):
        torch.distributed.all_reduce(weight_grad)
    grad = torch.zeros_like(output) if inputs.grad is None else inputs.grad
    statistics = {name: getattr(layer, name).clone() for name in ("running_mean", "running_var")}
    return {"output": output.detach(), "grad": grad, "weight_grad": weight_grad, **statistics}


def worker(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    join_process_group(rank, ranks, folder)
    sizes, results = [5, 3], {"collectives": []}
    for kind in ("uint8", "float"):
        images = raw_images(8)[0]
        inputs = images if kind == "uint8" else images.float() / 255
        upstream = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        reference = nn.BatchNorm2d(3)
        nn.init.constant_(reference.weight, 0.058)
        joined = images.float() / 255
        hand_made = step(reference, joined, upstream)
        if kind == "uint8":  # bytes have no gradient
            hand_made["grad"] = torch.zeros_like(joined)
        layer = InputBatchNorm(3)
        with Collectives() as counted:
            part = step(layer, inputs.split(sizes)[rank], upstream.split(sizes)[rank])
        results["collectives"].append(counted.count - 1)  # without our own all-reduce of the gradient
        results[kind] = {"layer": part, "joined": hand_made}
    shared = synchronize_batch_norms(nn.Sequential(nn.BatchNorm1d(3)))[0]
    results["single"] = [single_value(layer, rank) for layer in (InputBatchNorm(3), shared)]
    torch.save(results, folder / f"rank{rank}.pt")
    end_rank()


def single_value(layer: nn.Module, rank: int) -> dict[str, Any]:
    """Train on one sample that rank 0 has alone, then on two."""
    before = layer.running_var.clone()
    error = ""
    try:
        layer(torch.ones(1 - rank, 3))
    except ValueError as raised:
        error = str(raised)
    unchanged = torch.equal(layer.running_var, before)
    layer(torch.arange(1.0, 4.0).view(1, 3) * (rank + 1))  # one on each rank
    return {"error": error, "unchanged": unchanged, "goes on": not torch.equal(layer.running_var, before)}


class Save(LitNet):
    """Adds what it has become to what its rank has saved."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        super().__init__(model=model)
        self.folder = folder

    def on_train_end(self) -> None:
        file = self.folder / f"rank{self.global_rank}.pt"
        layer: Any = self.model[0]
        trained = {name: value.tolist() for name, value in layer.state_dict().items()}
        torch.save({**torch.load(file), "class": type(layer).__name__, "trained": trained}, file)


def fit(ranks: int, folder: Path) -> None:
    """Train with sync_batchnorm=True, which converts torch's own layers."""
    network = nn.Sequential(InputBatchNorm(3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    data = DataLoader(TensorDataset(*raw_images(32)), batch_size=8)
    run = trainer(folder, devices=ranks, strategy=strategy_of("ddp_spawn", ranks), sync_batchnorm=True, max_epochs=1)
    run.fit(Save(folder, network), data)


if __name__ == "__main__":
    number, place = int(sys.argv[1]), Path(sys.argv[2])
    torch.multiprocessing.spawn(worker, (number, place), nprocs=number)
    fit(number, place)
