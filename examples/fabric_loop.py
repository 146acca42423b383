"""Revisited batch norm in your own training loop with Fabric, on real digits, without a Trainer or callback.

`init_batch_norms` writes the scales, and `ScaleUpdateRule` trains them with lr / c::

    python examples/fabric_loop.py
    python examples/fabric_loop.py --accelerator cpu --devices 2 --strategy ddp --precision bf16-mixed
    python examples/fabric_loop.py --checkpoint run.ckpt  # after a stop, the same command goes on from run.ckpt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from digits import STEPS_PER_EPOCH, Digits, DigitsResNet, build
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import ScaleUpdateRule, init_batch_norms


def batches(digits: Digits, epoch: int, ranks: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Return the training images in an order set by seed and epoch, so that a resumed run sees the same batches.

    The batches of all ranks together have `batch_size` images: Fabric gives every rank its own part of the images.
    """
    generator = torch.Generator().manual_seed(digits.shuffle_seed + epoch)
    order = torch.randperm(len(digits.train_set), generator=generator)
    return DataLoader(TensorDataset(*digits.train_set[order]), digits.batch_size // ranks)


def train(fabric: L.Fabric, network: DigitsResNet, digits: Digits, settings: argparse.Namespace) -> nn.Module:
    """Train a network with the method, starting from the checkpoint if it exists.

    Args:
        fabric: Devices, strategy and precision.
        network: The untrained network.
        digits: The data.
        settings: The settings of the command line.

    Returns:
        The network as Fabric wraps it.
    """
    report = init_batch_norms(network, scale=settings.scale)
    fabric.print(report)  # the layers that were rewritten, and the layers that were left alone with the reason

    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=settings.epochs * STEPS_PER_EPOCH)
    model, optimizer = fabric.setup(network, optimizer)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "epoch": 0}
    if settings.checkpoint is not None and settings.checkpoint.exists():
        fabric.load(settings.checkpoint, state)  # replaces the scales that were written above by trained scales
        fabric.print(f"Goes on after epoch {state['epoch']} of {settings.checkpoint}")

    with ScaleUpdateRule(optimizer, report.scales, divisor=settings.divisor, weight_decay_exempt=report.scales):
        for epoch in range(state["epoch"], settings.epochs):
            model.train()
            for images, labels in fabric.setup_dataloaders(batches(digits, epoch, fabric.world_size)):
                optimizer.zero_grad()
                fabric.backward(F.cross_entropy(model(images), labels))
                optimizer.step()  # the scales learn with lr / divisor
                schedule.step()
            state["epoch"] = epoch + 1
            if settings.checkpoint is not None:
                fabric.save(settings.checkpoint, state)
    return model


def accuracy(fabric: L.Fabric, model: nn.Module, digits: Digits) -> float:
    """Return the accuracy in % on the test images; every rank tests on all of them."""
    images, labels = fabric.to_device(digits.test_set.tensors)
    model.eval()
    with torch.no_grad():
        return 100 * (model(images).argmax(1) == labels).double().mean().item()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the settings of the command line."""
    parser = argparse.ArgumentParser(description="Trains a network on digits with revisited batch norm, in Fabric.")
    parser.add_argument("--accelerator", default="auto", help="where to train (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="on how many (default: %(default)s)")
    parser.add_argument("--strategy", default="auto", help="such as ddp (default: %(default)s)")
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--scale", type=float, default=0.1, metavar="G", help="scale at the start (default: %(default)s)"
    )
    parser.add_argument(
        "--divisor", type=float, default=100.0, metavar="C", help="of their learning rate (default: %(default)g)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="is written after every epoch; a run goes on from one"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train, test, and print the mean scale of every layer."""
    settings = parse_arguments(arguments)
    fabric = L.Fabric(
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=settings.strategy,
        precision=settings.precision,
    )
    fabric.launch()
    network, digits = build(settings.seed)
    digits.setup("fit")
    model = train(fabric, network, digits, settings)
    fabric.print(f"Test accuracy: {accuracy(fabric, model, digits):.2f} %")
    for name, layer in network.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            fabric.print(f"  {name}: the mean scale is {layer.weight.mean():.4f}")


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
