"""Whole Trainers on one GPU, `make gpu`, and on two, `make test-gpu`. The authors have not run what needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.devices import ACCELERATOR
from helpers.lit import LitNet, loader, permanent_sgd, trainer
from helpers.logs import logged_in
from helpers.models import assert_same_parameters
from helpers.scripts import run_ranks

from lightning_revbn import RevisitedBatchNorm

PRECISIONS = {
    "cpu": ["64-true", "32-true", "bf16-mixed", "bf16-true"],
    "cuda": ["64-true", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true"],
}
CASES = [
    pytest.param(device, precision, marks=[pytest.mark.gpu] * (device == "cuda"))
    for device, precisions in PRECISIONS.items()
    for precision in precisions
]


@pytest.mark.filterwarnings("ignore:RevisitedBatchNorm. 3 scales are torch.b?float16:UserWarning")
@pytest.mark.parametrize(("device", "precision"), CASES)
def test_the_callback_equals_permanent_groups_in_every_precision(device: str, precision: Any, tmp_path: Path) -> None:
    options = {"accelerator": ACCELERATOR[device], "devices": 1, "precision": precision, "deterministic": True}
    ruled, grouped = LitNet(), LitNet(permanent_sgd)
    for module in (ruled, grouped):
        trainer(tmp_path, RevisitedBatchNorm(monitor=False), **options).fit(module, loader())
    assert_same_parameters(ruled, grouped)


@pytest.mark.gpu
@pytest.mark.two_gpus
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_two_gpus_train_and_are_measured_under_every_strategy(strategy: str, tmp_path: Path) -> None:
    run_ranks("gpus.py", strategy, tmp_path)
    logged = logged_in(tmp_path)
    assert float(logged[0]["revbn/scale_mean"]) == pytest.approx(0.1)
    assert {float(row["revbn/scale_lr"]) for row in logged} == {0.05 / 100}
    assert 0 < float(logged[-1]["revbn/scale_drift"]) < 0.01
