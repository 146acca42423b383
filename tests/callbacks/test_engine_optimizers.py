"""Optimizers that an engine puts in the place of the user's; processes/test_deepspeed.py has those of DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lit import LitNet, loader, trainer
from helpers.logs import rows
from helpers.models import scales
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from lightning_revbn import RevisitedBatchNorm, scale_param_groups


class FlatOptimizer:
    """Steps copies of the parameters, one flat tensor a group, as DeepSpeed's optimizers do; no torch optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.originals = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [torch.cat([p.detach().flatten() for p in group["params"]])]
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults

    def step(self, closure: Any) -> Any:
        result = closure()
        for group, originals in zip(self.param_groups, self.originals, strict=True):
            (flat,) = group["params"]
            flat.grad = torch.cat([p.grad.flatten() for p in originals])
        self.optimizer.step()
        for group, originals in zip(self.param_groups, self.originals, strict=True):
            values = group["params"][0].split([p.numel() for p in originals])
            for parameter, value in zip(originals, values, strict=True):
                parameter.data.copy_(value.view_as(parameter))
        return result

    def zero_grad(self) -> None:
        for parameter in (parameter for group in self.originals for parameter in group):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()


class Engine(SingleDeviceStrategy):
    """Takes the optimizer over after it was made."""

    def __init__(self, config: Any = None) -> None:
        super().__init__("cpu")
        self.config = config

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        self.optimizers = [FlatOptimizer(optimizer) for optimizer in self.optimizers]  # type: ignore[misc]


def fit(path: Path, configure: Any, config: Any = None, **options: Any) -> LitNet:
    module = LitNet(configure)
    logger = CSVLogger(path) if options.get("monitor", True) else False
    trainer(path, RevisitedBatchNorm(**options), strategy=Engine(config), logger=logger).fit(module, loader())
    return module


def plain(module: nn.Module) -> Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def permanent(module: nn.Module) -> Optimizer:
    return torch.optim.SGD(scale_param_groups(module, 0.05, 0.01), momentum=0.9)


def test_permanent_groups_are_recognised_and_train_as_the_rule_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = fit(tmp_path, permanent)
    reference = LitNet(plain)
    trainer(tmp_path, RevisitedBatchNorm(monitor=False)).fit(reference, loader())
    torch.testing.assert_close(scales(module), scales(reference), rtol=1e-5, atol=1e-8)
    told = [message for message in caplog.messages if "start from a new scale" in message]
    assert "\nthe scales learn with the learning rate of their groups, made by scale_param_groups\n" in told[0]
    logged = [row for row in rows(tmp_path) if "revbn/scale_lr" in row]
    assert {float(row["revbn/scale_lr"]) for row in logged} == {0.05 / 100}


def test_other_groups_are_refused_before_training_with_the_two_lines_to_add(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="FlatOptimizer trains copies of the parameters") as refused:
        fit(tmp_path, plain, monitor=False, scale_lr_divisor=50, exclude=["*.bn2"], weight_decay_exempt="norm")
    lines = [line.strip() for line in str(refused.value).splitlines() if line.startswith("    ")]
    assert lines == [
        "from lightning_revbn import scale_param_groups",
        "return torch.optim.SGD(scale_param_groups(self, lr=0.05, weight_decay=0.01, divisor=50.0, "
        "weight_decay_exempt='norm', exclude=('*.bn2',)))",
    ]
    names: dict[str, Any] = {"torch": torch}
    exec("\n".join(["def configure(self):", *(f"    {line}" for line in lines)]), names)
    module = fit(tmp_path, names["configure"], monitor=False, scale_lr_divisor=50, exclude=["*.bn2"])
    assert (module.model.stem[1].weight - 0.1).abs().max() < 0.01 < (module.model.bn2.weight - 1).abs().max()


def test_an_optimizer_of_the_engines_configuration_is_to_be_removed_from_there(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="and remove the optimizer from DeepSpeed's configuration"):
        fit(tmp_path, plain, config={"optimizer": {"type": "SGD"}}, monitor=False)


def test_without_divisor_and_exemption_any_optimizer_will_do(tmp_path: Path) -> None:
    module = fit(tmp_path, plain, monitor=False, scale_lr_divisor=1, weight_decay_exempt=None)
    reference = LitNet(plain)
    options = {"monitor": False, "scale_lr_divisor": 1, "weight_decay_exempt": None}
    trainer(tmp_path, RevisitedBatchNorm(**options)).fit(reference, loader())
    torch.testing.assert_close(scales(module), scales(reference), rtol=1e-5, atol=1e-8)
