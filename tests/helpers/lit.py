"""A small LightningModule, its data and a quiet Trainer."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from helpers.models import images, residual_net, scales
from lightning_revbn import RevisitedBatchNorm, find_batch_norms
from lightning_revbn.core.update_rule import active_rule

C = 100.0
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


def quiet(**options: Any) -> RevisitedBatchNorm:
    """The callback without its monitor, which has tests of its own."""
    return RevisitedBatchNorm(**{"monitor": False, **options})


def assert_nothing_left_behind(module: LitNet, run: L.Trainer) -> None:
    for optimizer in run.optimizers:
        assert active_rule(optimizer) is None
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert not {"setup", "configure_model"} & vars(module).keys()
    assert "setup_optimizers" not in vars(run.strategy)


Rates = list[list[tuple[float, float]]]
"""For every update, the learning rates of shift and scale of every layer that the optimizer holds."""


def probing_sgd(seen: Rates, lr: float = 0.05) -> Any:
    """Configure an SGD that notes the learning rates of its batch norm layers at every update."""

    def configure(module: nn.Module) -> Any:
        layers = [(id(record.shift), id(record.scale)) for record in find_batch_norms(module)]

        class Probing(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                result = super().step(closure)
                rates = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
                seen.append([(rates[shift], rates[scale]) for shift, scale in layers if {shift, scale} <= rates.keys()])
                return result

        return Probing(
            [p for p in module.parameters() if p.requires_grad],
            lr=getattr(module, "lr", lr),
            momentum=0.9,
            weight_decay=0.01,
        )

    return configure


def assert_ratio_everywhere(seen: Rates, steps: int, moves: bool = True) -> None:
    assert len(seen) >= steps
    assert all(seen)
    assert all(math.isclose(scale, base / C, rel_tol=1e-12) for rates in seen for base, scale in rates)
    if moves:
        assert len({base for rates in seen for base, _ in rates}) > 2, "the learning rate was expected to move"


class ByHand(Optimizer):
    """SGD with momentum as its textbook has it, but that scales take lr / c and no decay: one line for each parameter.

    It has one group, whatever callbacks do to groups: the reference for all of them.
    """

    def __init__(self, params: Any, own: list[nn.Parameter], lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        self.own = {id(scale) for scale in own}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                is_scale = id(p) in self.own
                gradient = p.grad if is_scale else p.grad.add(p, alpha=0.01)
                state = self.state[p]
                first = "momentum_buffer" not in state
                state["momentum_buffer"] = (
                    gradient.clone() if first else state["momentum_buffer"].mul_(0.9).add_(gradient)
                )
                p.add_(state["momentum_buffer"], alpha=-(group["lr"] / C if is_scale else group["lr"]))
        return loss


def by_hand(module: LitNet) -> Optimizer:
    return ByHand([p for p in module.parameters() if p.requires_grad], scales(module), module.lr)


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of the one `metrics.csv` below a directory, without empty cells."""
    (file,) = path.rglob("metrics.csv")
    with file.open() as lines:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(lines)]
