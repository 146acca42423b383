"""Run by test_input_norm_processes.py: one rank has values that cannot be measured."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from helpers.ranks import end_rank, join_process_group
from helpers.raw import same_states
from torch import Tensor

from lightning_revbn import InputNorm
from lightning_revbn.core.input_norm import InputError, OnlineStandardizer

FLOATS = torch.arange(12.0).view(4, 3)
WITH_NAN, WITH_INFINITY = FLOATS.clone(), FLOATS.clone()
WITH_NAN[1, 2], WITH_INFINITY[1, 2] = float("nan"), float("inf")
LARGE = torch.full((4, 3), 2**40)
CASES: dict[str, tuple[Tensor, Tensor]] = {  # good batches, and what rank 1 has instead
    "NaN": (FLOATS, WITH_NAN),
    "infinity": (FLOATS, WITH_INFINITY),
    "another kind": (FLOATS.byte(), FLOATS),
    "beyond 32 bits": (FLOATS.long(), LARGE),
}


def worker(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    join_process_group(rank, ranks, folder)
    results = {name: attempt(good, bad, rank, ranks, 2) for name, (good, bad) in CASES.items()}
    results["first step"] = attempt(FLOATS.byte(), FLOATS, rank, ranks, 0)
    torch.save(results, folder / f"rank{rank}.pt")
    end_rank()


def attempt(good: Tensor, bad: Tensor, rank: int, ranks: int, steps: int) -> dict[str, object]:
    standardizer = OnlineStandardizer(InputNorm(num_features=3))
    for _ in range(steps):
        standardizer.train(good, ranks=ranks)
    before = standardizer.state_dict()
    error = ""
    try:
        standardizer.train(bad if rank == 1 else good, ranks=ranks)
    except InputError as raised:
        error = str(raised)
    unchanged = same_states(before, standardizer.state_dict())
    standardizer.train(good, ranks=ranks)
    return {"error": error, "unchanged": unchanged, "goes on": standardizer.samples == (steps + 1) * 4 * ranks}


if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, (int(sys.argv[1]), Path(sys.argv[2])), nprocs=int(sys.argv[1]))
