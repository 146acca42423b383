"""Run by test_batch_norm_sync_processes.py: synchronised layers on two ranks, plain ones with the joined batch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from helpers.ranks import end_rank, join_process_group
from helpers.raw import Collectives
from helpers.synchronized_cases import CASES, IMAGES
from torch import Tensor, nn

from lightning_revbn.core.activations import compute_x_hat
from lightning_revbn.core.batch_norm_sync import restore_batch_norms, synchronize_batch_norms


class Fixed(nn.BatchNorm2d):
    """Normalises by the running statistics while it trains, too."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias)


class HandMade(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return input - input.mean((0, 2, 3), keepdim=True)


def step(layer: nn.Module, inputs: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Run two training steps, and return everything that came of them; gradients of parameters summed over ranks."""
    for _ in range(2):
        inputs = inputs.detach().clone().requires_grad_()
        output = layer(inputs)
        (output * upstream).sum().backward()
    gradients = {f"grad of {name}": value.grad for name, value in layer.named_parameters()}
    buffers = {name: value.clone() for name, value in layer.named_buffers()}
    return {"output": output.detach(), "input grad": inputs.grad, **gradients, **buffers}


def compare(name: str, rank: int) -> dict[str, Any]:
    make, shape, sizes = CASES[name]
    torch.manual_seed(0)
    layer = make()
    if name == "lazy":
        layer(torch.zeros(2, 3, 1, 1))
    layer = layer.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    reference = restore_batch_norms(copy.deepcopy(layer))
    inputs = torch.randn(shape, dtype=torch.float64) * 3 + 100  # of ranks that differ
    inputs[: sizes[0]] -= 50
    if name == "channels last":
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    part = inputs.split(sizes)[rank]
    place = torch.arange(8).split(sizes)[rank]
    if name == "SplitBatchNorm2d":  # the halves of the joined batch are made of the halves of all ranks
        order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
        inputs, place = inputs[order], order[place]  # the order is its own inverse
    upstream = torch.randn(reference(inputs).shape, dtype=torch.float64)
    reference = restore_batch_norms(copy.deepcopy(layer))
    joined = step(reference, inputs, upstream)
    synchronize_batch_norms(layer)
    run = torch.compile(layer, backend="aot_eager") if name == "compiled" else layer
    ours = step(run, part, upstream[place])
    for key, value in ours.items():
        if key.startswith("grad of"):
            torch.distributed.all_reduce(value)
    joined |= {key: joined[key][place] for key in ("output", "input grad")}
    ours = {key.replace("_orig_mod.", ""): value for key, value in ours.items()}
    is_last = part.numel() == 0 or ours["output"].is_contiguous(memory_format=torch.channels_last)
    return {"ours": ours, "joined": joined, "is channels last": is_last if name == "channels last" else None}


def halves(dtype: torch.dtype) -> dict[str, Tensor]:
    """Run a layer of half precision on this rank's part of large values with a small spread."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    inputs = (torch.randn(64, 3) + 8).to(dtype)
    joined = inputs.double().requires_grad_()
    upstream = torch.randn(64, 3)
    layer, reference = nn.BatchNorm1d(3), nn.BatchNorm1d(3).double()
    part = inputs.split(32)[rank].requires_grad_()
    output = synchronize_batch_norms(layer)(part)
    output.backward(upstream.split(32)[rank].to(dtype))
    expected = reference(joined)
    expected.backward(upstream.to(dtype).double())
    return {
        "output": output.detach(),
        "expected output": expected.detach().split(32)[rank],
        "grad": part.grad,
        "expected grad": joined.grad.split(32)[rank],
        "running_mean": layer.running_mean,
        "expected running_mean": reference.running_mean,
    }


def collectives(action: Callable[[], object]) -> int:
    with Collectives() as counted:
        action()
    return counted.count


def aside(rank: int) -> dict[str, Any]:
    """Look at what is not synchronised, and at what cannot be."""
    torch.manual_seed(rank)
    inputs = torch.randn(IMAGES)
    layer = synchronize_batch_norms(nn.BatchNorm2d(3))
    duplicate = copy.deepcopy(layer)
    groups = [torch.distributed.new_group([member]) for member in range(2)]
    alone, plain = synchronize_batch_norms(nn.BatchNorm2d(3), groups[rank]), nn.BatchNorm2d(3)
    every = [torch.empty_like(inputs) for _ in range(2)]
    torch.distributed.all_gather(every, inputs)
    everything = torch.cat(every)
    mean, variance = everything.mean((0, 2, 3), keepdim=True), everything.var((0, 2, 3), correction=0, keepdim=True)
    untracked = synchronize_batch_norms(nn.BatchNorm2d(3, track_running_stats=False)).eval()
    counts = {
        "forward": collectives(lambda: layer(inputs)),
        "forward and backward": collectives(lambda: layer(inputs.clone().requires_grad_()).sum().backward()),
        "input without gradient": collectives(lambda: layer(inputs).sum().backward()),
        "copy": collectives(lambda: duplicate(inputs)),
        "other group": collectives(lambda: alone(inputs)),
        "evaluation": collectives(lambda: layer.eval()(inputs)),
        "evaluation by the batch": collectives(lambda: untracked(inputs)),
        "fixed statistics": collectives(lambda: synchronize_batch_norms(Fixed(3))(inputs)),
        "restored": collectives(lambda: restore_batch_norms(duplicate)(inputs)),
    }
    with torch.no_grad():
        counts["no grad"] = collectives(lambda: layer.train()(inputs))
    try:
        synchronize_batch_norms(nn.Sequential(HandMade(3)))(inputs)
    except RuntimeError as error:
        refusal = str(error)
    plain(inputs)
    before = layer.running_mean.clone(), layer.running_var.clone()
    layer(inputs[:0])
    empty = {"before": before, "after": (layer.running_mean, layer.running_var)}
    x_hat = compute_x_hat(layer, inputs)
    return {
        "collectives": counts,
        "empty": empty,
        "refusal": refusal,
        "x_hat": (x_hat, (inputs - mean) * (variance + 1e-5).rsqrt()),
        "alone": (alone.running_var, plain.running_var),
    }


def worker(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    join_process_group(rank, ranks, folder)
    results = {name: compare(name, rank) for name in CASES}
    results["aside"] = aside(rank)
    results["halves"] = {str(dtype): halves(dtype) for dtype in (torch.bfloat16, torch.float16)}
    torch.save(results, folder / f"rank{rank}.pt")
    end_rank()


if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, (int(sys.argv[1]), Path(sys.argv[2])), nprocs=int(sys.argv[1]))
