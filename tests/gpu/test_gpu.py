"""What needs CUDA, and two devices where there are two ranks: `make test-gpu`. The authors have not run it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.lit import LitNet, loader, permanent_sgd, trainer
from helpers.logs import logged_in
from helpers.models import assert_same_parameters, images, residual_net, scales
from helpers.scripts import run_ranks
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm, ScaleUpdateRule, scale_param_groups

pytestmark = pytest.mark.gpu


@pytest.mark.filterwarnings("ignore:RevisitedBatchNorm. 3 scales are torch.bfloat16:UserWarning")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_the_callback_equals_permanent_groups_on_one_gpu(precision: Any, tmp_path: Path) -> None:
    options = {"accelerator": "gpu", "devices": 1, "precision": precision, "deterministic": True}
    ruled, grouped = LitNet(), LitNet(permanent_sgd)
    for module in (ruled, grouped):
        trainer(tmp_path, RevisitedBatchNorm(monitor=False), **options).fit(module, loader())
    assert_same_parameters(ruled, grouped)


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {"foreach": True}])
def test_the_rule_equals_permanent_groups_with_the_kernels_of_cuda(options: dict[str, bool]) -> None:
    first = residual_net().cuda()
    second = copy.deepcopy(first)
    inputs, targets = (tensor.cuda() for tensor in images(8))
    ruled = torch.optim.Adam(first.parameters(), lr=0.01, **options)
    grouped = torch.optim.Adam(scale_param_groups(second, 0.01), **options)
    with ScaleUpdateRule(ruled, scales(first)):
        for _ in range(4):
            for model, optimizer in ((first, ruled), (second, grouped)):
                optimizer.zero_grad()
                cross_entropy(model(inputs), targets).backward()
                optimizer.step()
    assert_same_parameters(first, second)


@pytest.mark.two_gpus
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_two_gpus_train_and_are_measured_under_every_strategy(strategy: str, tmp_path: Path) -> None:
    run_ranks("gpus.py", strategy, tmp_path)
    logged = logged_in(tmp_path)
    assert float(logged[0]["revbn/scale_mean"]) == pytest.approx(0.1)
    assert {float(row["revbn/scale_lr"]) for row in logged} == {0.05 / 100}
    assert 0 < float(logged[-1]["revbn/scale_drift"]) < 0.01


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
