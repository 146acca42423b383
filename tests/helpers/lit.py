"""A small LightningModule, its data and a quiet Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from helpers.models import images, residual_net
from lightning_revbn import RevisitedBatchNorm, scale_param_groups

Configure = Callable[[nn.Module], Any]


def sgd(module: nn.Module) -> Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def permanent_sgd(module: nn.Module) -> Optimizer:
    """Configure the same optimizer from the package's permanent groups."""
    return torch.optim.SGD(scale_param_groups(module, lr=0.05, weight_decay=0.01), momentum=0.9)


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
    """Batches in a fixed order; they keep their position, so that a run can be resumed at any step."""

    def __init__(self, inputs: Tensor, targets: Tensor, size: int = 8) -> None:
        self._batches = list(zip(inputs.split(size), targets.split(size), strict=True))
        self._next = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._next %= len(self._batches)  # after a whole epoch start anew, after a part go on
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


def quiet(**options: Any) -> RevisitedBatchNorm:
    """Return the callback without its monitor, which has its own tests."""
    return RevisitedBatchNorm(**{"monitor": False, **options})
