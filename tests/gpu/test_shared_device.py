"""Two ranks that share one device by gloo learn what one process learns; so do sharded parameters on one device.

The tests that communicate are in the last file: where communication hangs, all others have run.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.devices import DEVICES, GPU
from helpers.lit import LitNet, loader, trainer
from helpers.logs import logged_in
from helpers.scripts import run_ranks
from helpers.strategies import RUNS_ON_CPU
from lightning.pytorch.loggers import CSVLogger

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm

SHARDED = [*["cpu"] * RUNS_ON_CPU, GPU]


@pytest.mark.parametrize("device", DEVICES)
def test_two_ranks_learn_what_one_process_learns(device: str, tmp_path: Path) -> None:
    run_ranks("one_device.py", "share", device, tmp_path)
    alone, *ranks = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("alone", "rank0", "rank1"))
    kinds = {"BatchNormSync", "SyncBatchNorm"} if device == "cuda" else {"BatchNormSync"}
    for of_rank in ranks:
        assert of_rank.keys() == kinds
        for kind, learned in of_rank.items():
            assert learned["parameters"].keys() == alone["parameters"].keys()
            for key, value in learned["parameters"].items():
                expected = alone["parameters"][key]
                torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10, msg=f"{kind}: {key}")
            for key in ("mean", "std", "count"):
                torch.testing.assert_close(learned[key], alone[key], rtol=1e-12, atol=0, msg=f"{kind}: {key}")


@pytest.mark.parametrize("device", SHARDED)
def test_parameters_sharded_on_one_device_learn_what_whole_parameters_learn(device: str, tmp_path: Path) -> None:
    run_ranks("one_device.py", "shard", device, tmp_path)
    learned = torch.load(tmp_path / "learned.pt", weights_only=True)
    assert learned["fsdp2"].keys() == learned["auto"].keys()
    assert 0 < (learned["auto"]["model.bn1.weight"] - 0.1).abs().max() < 0.01
    for key, value in learned["fsdp2"].items():
        torch.testing.assert_close(value, learned["auto"][key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.gpu
def test_synchronised_layers_are_rewritten_and_measured(tmp_path: Path) -> None:
    module = LitNet()
    callback = RevisitedBatchNorm(monitor=BatchNormMonitor(activations=True))
    options = {"accelerator": "gpu", "devices": 1, "strategy": "ddp", "sync_batchnorm": True}
    seen: list[str] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.extend(type(layer).__name__ for layer in pl_module.modules() if hasattr(layer, "running_mean"))

    trainer(tmp_path, callback, Look(), logger=CSVLogger(tmp_path), **options).fit(module, loader())
    assert seen == ["SyncBatchNorm"] * 3
    logged = logged_in(tmp_path)
    assert float(logged[0]["revbn/scale_mean"]) == pytest.approx(0.1)
    assert all(float(row["revbn/normalized_absmax"]) > 1 for row in logged)
