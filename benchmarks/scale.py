"""Measures what several ranks cost: collectives and bytes a step, seconds, and the time until the first step.

Ranks are gloo processes on this machine. Collectives and bytes are counted where torch dispatches them. Seconds are
those that an operation takes longer on several ranks than the same operation on its own, all ranks at once. A model of
two constants is fitted to the seconds of 2 and 4 ranks, compared with those of 8, and goes on to 64 ranks on paper.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.distributed
import torchvision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.lit import trainer
from helpers.ranks import end_rank, join_process_group

from lightning_revbn import BatchNormMonitor, InputNorm, RevisitedBatchNorm
from lightning_revbn.core.batch_norm_sync import synchronize_batch_norms
from lightning_revbn.core.input_norm import OnlineStandardizer
from lightning_revbn.core.table import plain_table
from lightning_revbn.plugins import BatchNormSync

RANKS = (2, 4, 8, 16, 32, 64)
FITTED, CHECKED = (2, 4), 8
WIDTHS = (16, 256, 2048)
CALLS = 20
"""Calls of an operation that are timed together."""


class Traffic(NamedTuple):
    """What a rank hands over to collectives: how many of each kind, and the bytes of all of them."""

    gathers: int = 0
    gathered: int = 0
    reductions: int = 0
    reduced: int = 0

    def messages(self, ranks: int) -> int:
        """Return how many messages a rank sends, one after the other; gloo passes parts around a ring."""
        return (ranks - 1) * (self.gathers + 2 * self.reductions)

    def sent(self, ranks: int) -> float:
        """Return how many bytes a rank sends."""
        return (ranks - 1) * (self.gathered + 2 * self.reduced / ranks)


class Counter(TorchDispatchMode):
    """Counts collectives and the bytes that this rank hands over to them."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a collective; refuse others than the two that the package uses."""
        if func.namespace == "c10d":
            name, tensors = func.overloadpacket.__name__, args[{"allgather_": 1}.get(func.overloadpacket.__name__, 0)]
            size = sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor))
            added = {"allgather_": Traffic(1, size), "allreduce_": Traffic(0, 0, 1, size)}[name]
            self.traffic = Traffic(*map(sum, zip(self.traffic, added, strict=True)))
        return func(*args, **(kwargs or {}))


def resnet_step(make: Callable[[], nn.Module]) -> Callable[[], object]:
    """Return a step of a network whose layers are synchronised, on few small images."""
    network = synchronize_batch_norms(make())
    return lambda: network(torch.randn(2, 3, 32, 32)).sum().backward()


def input_step(values: Tensor) -> Callable[[], object]:
    """Return a step of input statistics, past the first one, in which ranks agree on the kind of numbers."""
    standardizer = OnlineStandardizer(InputNorm(values.shape[1]))
    standardizer.train(values)
    return lambda: standardizer.train(values)


COUNTED: dict[str, Callable[[], Callable[[], object]]] = {
    "input statistics, 3 channels of uint8": lambda: input_step(torch.randint(0, 256, (4, 3, 8, 8)).byte()),
    "input statistics, 3 channels of float32": lambda: input_step(torch.randn(4, 3, 8, 8)),
    "input statistics, 64 columns of float32": lambda: input_step(torch.randn(4, 64)),
    "BatchNormSync, ResNet-18": lambda: resnet_step(torchvision.models.resnet18),
    "BatchNormSync, ResNet-50": lambda: resnet_step(torchvision.models.resnet50),
}


def count(rank: int, folder: Path) -> None:
    """Count what two ranks hand over."""
    torch.set_num_threads(1)
    join_process_group(rank, 2, folder)
    found: dict[str, Traffic] = {}
    for name, make in COUNTED.items():
        step = make()
        with Counter() as counter:
            step()
        found[name] = counter.traffic
    if rank == 0:
        (folder / "counted.json").write_text(json.dumps(found))
    end_rank()


class Operation(NamedTuple):
    """An operation on its own and with several ranks, and what it hands over."""

    alone: Callable[[], object]
    together: Callable[[], object]
    traffic: Traffic


def operations(ranks: int) -> dict[str, Operation]:
    """Return operations of both kinds, whose tensors are so small that little else than communication is timed."""
    found: dict[str, Operation] = {}
    for width in WIDTHS:
        values = torch.randn(4, width)
        standardizer = OnlineStandardizer(InputNorm(width))
        steps = [lambda n=n, s=standardizer, v=values: s.train(v, ranks=n) for n in (1, ranks)]
        found[f"input statistics, {width} columns"] = _operation(*steps)
    for width in WIDTHS:
        plain, synchronized = nn.BatchNorm1d(width), synchronize_batch_norms(nn.BatchNorm1d(width))
        values = torch.randn(4, width, requires_grad=True)
        steps = [lambda layer=layer, v=values: layer(v).sum().backward() for layer in (plain, synchronized)]
        found[f"BatchNormSync, {width} channels"] = _operation(*steps)
    return found


def _operation(alone: Callable[[], object], together: Callable[[], object]) -> Operation:
    together()
    with Counter() as counter:
        together()
    return Operation(alone, together, counter.traffic)


def measure(rank: int, ranks: int, rounds: int, folder: Path) -> None:
    """Time the operations, all ranks at once; rank 0 saves the seconds that each is slower together than alone."""
    torch.set_num_threads(1)
    join_process_group(rank, ranks, folder)
    found: dict[str, tuple[Traffic, list[float]]] = {}
    for name, operation in operations(ranks).items():
        slower = [_timed(operation.together) - _timed(operation.alone) for _ in range(rounds)]
        found[name] = operation.traffic, slower
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(found))
    end_rank()


def _timed(function: Callable[[], object]) -> float:
    torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(CALLS):
        function()
    return (time.perf_counter() - start) / CALLS


def spawned(function: Callable[..., None], ranks: int, file: str, *arguments: Any) -> Any:
    """Run a function on several ranks, and return what rank 0 has saved."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(function, (*arguments, Path(folder)), nprocs=ranks)
        return json.loads(Path(folder, file).read_text())


class Model(NamedTuple):
    """Seconds of collectives: a constant for every message and another for every byte that a rank sends."""

    message: float
    byte: float

    @classmethod
    def fit(cls, measured: dict[int, dict[str, tuple[Traffic, float]]]) -> Model:
        """Fit the constants, with the least relative errors squared."""
        rows: list[tuple[float, float]] = []
        for ranks in FITTED:
            for traffic, seconds in measured[ranks].values():
                rows.append((traffic.messages(ranks) / seconds, traffic.sent(ranks) / seconds))
        matrix = np.array(rows)
        message, byte = np.linalg.lstsq(matrix, np.ones(len(rows)), rcond=None)[0]
        return cls(float(message), float(byte))

    def seconds(self, traffic: Traffic, ranks: int) -> float:
        """Return the seconds of a step."""
        return self.message * traffic.messages(ranks) + self.byte * traffic.sent(ranks)


class Clock(L.Callback):
    """Times a fit from its first hook to its first batch."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Stop, on the last rank to come."""
        seconds = torch.tensor(time.perf_counter() - self.start)
        torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
        if trainer.is_global_zero:
            Path(trainer.default_root_dir, "seconds").write_text(str(seconds.item()))


class Layers(L.LightningModule):
    """Many narrow batch norm layers."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(count)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return a loss."""
        return self.layers(batch).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def startup(layers: int, ranks: int, *, with_package: bool) -> float:
    """Return the seconds from the first hook of a fit to its first batch."""
    ours = [RevisitedBatchNorm(monitor=BatchNormMonitor())] if with_package else []
    with tempfile.TemporaryDirectory() as folder:
        strategy = DDPStrategy(start_method="fork")
        options = {"plugins": [BatchNormSync()] if with_package else [], "strategy": strategy, "devices": ranks}
        run = trainer(Path(folder), Clock(), *ours, max_steps=1, log_every_n_steps=50, **options)
        run.fit(Layers(layers), DataLoader([torch.randn(4, 4)], batch_size=None))  # type: ignore[arg-type]
        return float(Path(folder, "seconds").read_text())


def print_counts(counted: dict[str, Traffic]) -> None:
    """Print what a step hands over and sends, with gradients for comparison."""
    gradients = {
        name: sum(parameter.numel() * 4 for parameter in make().parameters())
        for name, make in (("ResNet-18", torchvision.models.resnet18), ("ResNet-50", torchvision.models.resnet50))
    }
    traffic = counted | {f"gradients of {name} under DDP": Traffic(0, 0, 0, size) for name, size in gradients.items()}
    rows: list[list[str]] = []
    for name, of in traffic.items():
        number = of.gathers + of.reductions
        rows.append([name, str(number or "-"), *(readable(of.sent(ranks)) for ranks in RANKS)])
    print("collectives of a step, counted, and the bytes that a rank sends in them")
    summary = "gathers grow with the number of ranks, the reduction of gradients does not"
    print(plain_table(["", "collectives", *(f"{ranks} ranks" for ranks in RANKS)], rows, summary))


def readable(size: float) -> str:
    """Return a number of bytes in three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.{max(0, 2 - int(math.log10(max(size, 1))))}f} {unit}"


def print_measured(measured: dict[int, dict[str, tuple[Traffic, float]]], model: Model, rounds: int) -> None:
    """Print what was measured beside what the model says."""
    rows: list[list[str]] = []
    for name in measured[CHECKED]:
        cells: list[str] = []
        for ranks in (*FITTED, CHECKED):
            traffic, seconds = measured[ranks][name]
            expected = model.seconds(traffic, ranks)
            cells += [f"{1e3 * seconds:.2f}", f"{1e3 * expected:.2f}"]
        rows.append([name, *cells])
    titles = [title for ranks in (*FITTED, CHECKED) for title in (f"{ranks} ranks", "model")]
    print(f"milliseconds that a call takes longer on several ranks, {os.cpu_count()} cores, median of {rounds} rounds")
    ratios = [seconds / model.seconds(traffic, CHECKED) for traffic, seconds in measured[CHECKED].values()]
    summary = (
        f"the model, fitted to {FITTED[0]} and {FITTED[1]} ranks: {1e6 * model.message:.0f} microseconds a message and "
        f"{1e9 * model.byte:.2f} nanoseconds a byte"
    )
    print(plain_table(["", *titles], rows, summary))
    print(f"measured / model at {CHECKED} ranks: {min(ratios):.2f} to {max(ratios):.2f}")


def print_paper(counted: dict[str, Traffic], own: Model, network: Model) -> None:
    """Print the seconds of a step on more ranks, each with a core of its own."""
    print("milliseconds a step by the model: constants of this machine, whose ranks share cores, and of a network")
    summary = f"network: {1e6 * network.message:g} microseconds a message, {8e-9 / network.byte:g} Gbit/s"
    rows = [
        [f"{name}, {where}", *(f"{1e3 * model.seconds(of, ranks):.3g}" for ranks in RANKS)]
        for name, of in counted.items()
        for where, model in (("this machine", own), ("network", network))
    ]
    print(plain_table(["", *(f"{ranks} ranks" for ranks in RANKS)], rows, summary))


def print_startup(rounds: int) -> None:
    """Print how much later the first batch comes."""
    rows: list[list[str]] = []
    for layers in (10, 100, 1000):
        cells: list[str] = []
        for ranks in (2, 4, 8):
            added: list[float] = []
            plain: list[float] = []
            for _ in range(rounds):
                plain.append(startup(layers, ranks, with_package=False))
                added.append(startup(layers, ranks, with_package=True) - plain[-1])
            cells.append(f"{statistics.median(added):+.2f} ({statistics.median(plain):.2f})")
        rows.append([str(layers), *cells])
    print("seconds that the first batch comes later, and in brackets when it comes without the package")
    summary = f"callback, monitor and BatchNormSync; from the setup of callbacks on; slowest rank, median of {rounds}"
    print(plain_table(["layers", *(f"{ranks} ranks" for ranks in (2, 4, 8))], rows, summary))


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the operations (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=5, help="rounds of the startup (default: %(default)s)")
    parser.add_argument("--latency", type=float, default=50.0, help="microseconds a message (default: %(default)s)")
    parser.add_argument("--gbit", type=float, default=10.0, help="gigabits a second (default: %(default)s)")
    arguments = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    counted = {name: Traffic(*of) for name, of in spawned(count, 2, "counted.json").items()}
    print_counts(counted)
    measured: dict[int, dict[str, tuple[Traffic, float]]] = {}
    for ranks in (*FITTED, CHECKED):
        found = spawned(measure, ranks, "measured.json", ranks, arguments.rounds)
        measured[ranks] = {name: (Traffic(*of), statistics.median(slower)) for name, (of, slower) in found.items()}
    model = Model.fit(measured)
    print()
    print_measured(measured, model, arguments.rounds)
    print()
    print_paper(counted, model, Model(1e-6 * arguments.latency, 8e-9 / arguments.gbit))
    print()
    print_startup(arguments.starts)


if __name__ == "__main__":
    main()
