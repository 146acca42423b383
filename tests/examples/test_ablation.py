"""The parts of a small scale: each changes what it says and nothing else, and together they are the method."""

from __future__ import annotations

import ablation
import lightning as L
import pytest
import torch
from digits import Digits, DigitsResNet
from torch import nn

from lightning_revbn import RevisitedBatchNorm

DIVISOR = 100.0


class Recorder(L.Callback):
    """Keeps the values that training starts from, and those after every step."""

    def __init__(self) -> None:
        self.values: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.keep(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: object) -> None:
        self.keep(pl_module)

    def keep(self, network: nn.Module) -> None:
        self.values.append({name: value.detach().clone() for name, value in network.named_parameters()})


def train(*callbacks: L.Callback, epochs: int = 1) -> tuple[DigitsResNet, Recorder]:
    """Train a network in float64: 7 steps an epoch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, recorder = DigitsResNet().double(), Recorder()
        L.Trainer(
            accelerator="cpu",
            precision="64-true",
            max_epochs=epochs,
            limit_val_batches=0,
            callbacks=[*callbacks, recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(network, Digits())
    return network, recorder


def kind(network: DigitsResNet, name: str) -> str:
    """Return which part a parameter belongs to, by its place in the network."""
    module, _, value = name.rpartition(".")
    if isinstance(network.get_submodule(module), nn.BatchNorm2d):
        return {"weight": "scale", "bias": "shift"}[value]
    return "head" if name == "head.2.weight" else "rest"


@pytest.mark.parametrize("scale", [0.1, 0.25])
def test_all_parts_together_are_the_method_in_float64(scale: float) -> None:
    method, values = train(RevisitedBatchNorm(scale=scale, scale_lr_divisor=DIVISOR, monitor=False), epochs=3)
    parts = ablation.parts_of(scale, DIVISOR)
    assert ("scale" in parts) == (scale == 0.25)
    _, others = train(ablation.ScaleOne(scale, DIVISOR, parts), epochs=3)
    assert len(values.values) == len(others.values) == 22
    factors = {"scale": scale, "shift": scale, "head": 1 / scale, "rest": 1.0}
    for ours, theirs in zip(values.values, others.values, strict=True):
        for name, value in ours.items():
            expected = factors[kind(method, name)] * theirs[name]
            torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-10, msg=name)
