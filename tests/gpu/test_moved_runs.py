"""A run that goes from a CPU to another device and back: the checkpoint of one device is that of the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.devices import ACCELERATOR, DEVICES
from helpers.lit import trainer
from helpers.models import residual_net
from helpers.raw import RawData, SeeingNet
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from lightning_revbn import RevisitedBatchNorm

EPOCHS = 3


def adamw(module: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), 0.01, weight_decay=0.01)
    schedule = OneCycleLR(optimizer, max_lr=0.05, total_steps=6 * EPOCHS + 1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: Path, device: str, epochs: int, start: Path | None = None) -> Path:
    """Train to the end of an epoch, and return the checkpoint."""
    options: dict[str, Any] = {
        "accelerator": ACCELERATOR[device],
        "devices": 1,
        "max_epochs": epochs,
        "precision": "64-true",  # so that sums in another order do not matter
    }
    run = trainer(folder, RevisitedBatchNorm(shift_lr_multiplier=10.0), **options)
    # In float64 from the start: Lightning restores a checkpoint before it raises the precision of a model.
    run.fit(SeeingNet(adamw, residual_net().double()), RawData(), ckpt_path=start)
    path = folder / f"{device}-{epochs}.ckpt"
    run.save_checkpoint(path)
    return path


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Assert that two states are the same, numbers but for rounding."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(first, torch.Tensor):
        torch.testing.assert_close(first.cpu(), second.cpu(), rtol=1e-6, atol=1e-9, msg=lambda text: f"{where}: {text}")
    elif isinstance(first, float):
        assert first == pytest.approx(second, rel=1e-9), where
    else:
        assert first == second, where


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_that_moves_and_comes_back_ends_as_one_that_stayed(device: str, tmp_path: Path) -> None:
    stayed = fit(tmp_path / "stayed", "cpu", EPOCHS)
    path: Path | None = None
    for epochs, place in enumerate(("cpu", device, "cpu"), start=1):
        path = fit(tmp_path / f"moved{epochs}", place, epochs, path)
    first, second = (torch.load(path, weights_only=False, map_location="cpu") for path in (stayed, path))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "RawData"):
        assert_same(first[part], second[part], part)
    assert first["callbacks"]["RevisitedBatchNorm"]
