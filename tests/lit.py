"""A small LightningModule, its data and a quiet Trainer."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed
from models import images, residual_net
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

Configure = Callable[[nn.Module], Any]


def sgd(module: nn.Module) -> Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


class LitNet(L.LightningModule):
    def __init__(self, configure: Configure = sgd, model: nn.Module | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.model = residual_net() if model is None else model
        self.configure = configure
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return cross_entropy(self.model(inputs), targets)

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Batches:
    """Batches in a fixed order that remember where they are, so that a run can be resumed at any step."""

    def __init__(self, inputs: Tensor, targets: Tensor, size: int = 8) -> None:
        self._batches = list(zip(inputs.split(size), targets.split(size), strict=True))
        self._next = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._next %= len(self._batches)
        while self._next < len(self._batches):
            self._next += 1
            yield self._batches[self._next - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


def loader(batches: int = 6, size: int = 8) -> Batches:
    return Batches(*images(batches * size), size)


def trainer(path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "log_every_n_steps": 1,
    }
    return L.Trainer(default_root_dir=path, callbacks=list(callbacks), **{**defaults, **options})


def leave_process_group() -> None:
    """End the communication of this process: threads of gloo that outlive the interpreter abort it now and then."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of the one `metrics.csv` below a directory, without empty cells."""
    (file,) = path.rglob("metrics.csv")
    with file.open() as lines:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(lines)]
