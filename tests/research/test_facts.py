"""The protocol against the paper's, both written out: start of the weights, groups, split and 20 steps of training.

Nothing here calls our code to get an expected value: network, rule and loop are plain PyTorch.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import arms
import data_sets
import lightning as L
import networks
import paper_protocol
import pytest
import torch
from digits import DigitsResNet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

SEEDS = {0: 4186399962, 1: 1869972635, 15: 529477619}
"""The derived seeds that the paper's code has for these numbers."""


class Stop(L.Callback):
    """Keeps what training begins with and ends it after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.groups = [dict(group) for group in trainer.optimizers[0].param_groups]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].item())
        trainer.should_stop = len(self.losses) >= self.steps


def begin(head_init: str = "paper") -> DigitsResNet:
    """Return the network of seed 1 as a run makes it."""
    L.seed_everything(SEEDS[1], verbose=False)
    network = networks.make_network("cnn", "digits", 1, head_init=head_init)
    assert isinstance(network, DigitsResNet)
    return network


@pytest.mark.parametrize(("head_init", "factor"), [("paper", math.sqrt(6)), ("torch", 1.0)])
def test_weights_start_as_in_the_reference_code(head_init: str, factor: float) -> None:
    network = begin(head_init)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * 9 if module.kernel_size == (3, 3) else module.in_channels
            count = module.weight.numel()
            ratio = module.weight.square().mean().item() / (2 / fan_in)
            assert abs(ratio - 1) < 5 * math.sqrt(2 / count), name  # a chi-square of so many values
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
    head = network.head[-1]
    bound = factor / math.sqrt(32)
    assert head.weight.shape == (10, 32)
    assert 0.97 * bound < head.weight.abs().max().item() <= bound  # the largest of 320 uniform values
    assert torch.equal(head.bias, torch.zeros(10))


def test_validation_takes_a_stratified_tenth_by_the_derived_seed() -> None:
    pixels, labels = load_digits(return_X_y=True)
    development, test = train_test_split(range(1797), test_size=0.5, stratify=labels, random_state=0)
    train, val = train_test_split(development, test_size=0.1, stratify=labels[development], random_state=SEEDS[0])
    found = data_sets.load("digits", "", None)
    for (images, classes), expected in zip(found, (train, val, test), strict=True):
        torch.testing.assert_close(images, torch.tensor(pixels[expected] / 16).float().view(-1, 1, 8, 8))
        assert classes.tolist() == labels[expected].tolist()


def train_plainly(network: DigitsResNet, arm: arms.Arm, steps: int) -> list[float]:
    """Train with SGD, momentum, cosine schedule and the paper's two rules written out for every parameter.

    Returns:
        The loss of every step.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    scales, shifts = {id(norm.weight) for norm in norms}, {id(norm.bias) for norm in norms}
    for norm in norms:
        if arm.scale is not None:
            nn.init.constant_(norm.weight, arm.scale)
        norm.eps = norm.eps if arm.eps is None else arm.eps
    divisor = 1.0 if arm.scale is None else arm.scale_lr_divisor
    velocity = {id(parameter): torch.zeros_like(parameter) for parameter in network.parameters()}
    (images, labels), _, _ = data_sets.load("digits", "", None)
    order = torch.Generator().manual_seed(SEEDS[1])
    losses: list[float] = []
    for epoch in range(100):
        rate = 1e-8 + (0.1 - 1e-8) * (1 + math.cos(math.pi * epoch / 100)) / 2
        for chosen in torch.randperm(808, generator=order).split(128):
            loss = F.cross_entropy(network(images[chosen].double()), labels[chosen])
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                    decay = 1e-4 if parameter.dim() > 1 else 0.0
                    velocity[id(parameter)].mul_(0.9).add_(gradient + decay * parameter)
                    own = rate / divisor if id(parameter) in scales else rate
                    own = rate * arm.shift_lr_multiplier if id(parameter) in shifts else own
                    parameter.sub_(own * velocity[id(parameter)])
            losses.append(loss.item())
            if len(losses) == steps:
                return losses
    raise AssertionError("100 epochs have more steps")


@pytest.mark.parametrize(
    "text",
    ["baseline", "scale=0.1", "scale=1,scale_lr_divisor=1,shift_lr_multiplier=10,eps=1e-3", "scale=0.25,eps=1e-3"],
)
def test_groups_and_twenty_steps_are_those_of_plain_pytorch(text: str) -> None:
    arm = arms.parse_arm(text)
    network, plain = begin().double(), copy.deepcopy(begin()).double()
    splits = [(images.double(), labels) for images, labels in data_sets.load("digits", "", None)]
    data, stop = data_sets.make_data(splits, "none", batch_size=128, seed=SEEDS[1]), Stop(steps=20)
    trainer = L.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_epochs=100,
        limit_val_batches=0,
        callbacks=[*arm.callbacks(), stop],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network, data)
    decayed, others = stop.groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0.0)
    assert all(parameter.dim() > 1 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in others["params"])
    assert (decayed["momentum"], decayed["lr"]) == (0.9, 0.1)
    expected = train_plainly(plain, arm, steps=20)
    assert stop.losses == pytest.approx(expected, rel=1e-9)
    for (name, value), reference in zip(network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-8, atol=1e-12, msg=name)


class Keeper(L.Callback):
    """Keeps the network after every epoch."""

    def __init__(self) -> None:
        self.kept: list[nn.Module] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DigitsResNet)
        copied = DigitsResNet()
        copied.load_state_dict(pl_module.state_dict())
        self.kept.append(copied)


def test_the_best_epochs_test_accuracy_is_that_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper()
    monkeypatch.setattr(paper_protocol.Run, "callbacks", lambda run: [keeper])
    parsed = paper_protocol.parse_arguments(["digits", "--arms", "baseline", "--epochs", "3", "--seeds", "1"])
    result = paper_protocol.train(paper_protocol.grid(parsed)[0], tmp_path / "run")
    _, val, test = data_sets.load("digits", "", None)
    validation = [accuracy(network, *val) for network in keeper.kept]
    best = validation.index(max(validation))
    assert result["best_epoch"] == best + 1
    assert result["best_val_acc"] == pytest.approx(validation[best])
    assert result["best_test_acc"] == pytest.approx(accuracy(keeper.kept[best], *test))
    assert result["test_acc"] == pytest.approx(accuracy(keeper.kept[-1], *test))


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * (network.eval()(images).argmax(1) == labels).double().mean().item()
