"""DeepSpeed on two gloo ranks of a CPU: permanent groups recognised, other optimizers refused, partitions rewritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lit import LitNet
from helpers.logs import logged_in
from helpers.models import BATCH_NORMS
from helpers.scripts import run_ranks

pytestmark = pytest.mark.deepspeed


@pytest.fixture(scope="module", params=[1, 2, 3])
def zero(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("zero")
    run_ranks("deepspeed_ranks.py", request.param, folder)
    return folder, torch.load(folder / "rank0.pt", weights_only=True)


def test_permanent_groups_train_as_under_ddp_and_resume(zero: tuple[Path, dict[str, Any]]) -> None:
    values = zero[1]["values"]
    for name in ("callback", "resumed"):
        torch.testing.assert_close(values[name], values["by hand"], rtol=1e-4, atol=1e-6)
    assert 0 < (values["callback"]["model.bn1.weight"] - 0.1).abs().max() < 0.01


def test_the_monitor_measures_whole_scales_and_the_learning_rate_of_the_groups(
    zero: tuple[Path, dict[str, Any]],
) -> None:
    logged = logged_in(zero[0] / "lightning_logs")
    assert [int(row["step"]) for row in logged] == list(range(8))
    assert {float(row["revbn/scale_lr"]) for row in logged} == {0.05 / 100}
    for layer in BATCH_NORMS:
        assert float(logged[0][f"revbn/model.{layer}/scale_mean"]) == pytest.approx(0.1)
        assert 0 < float(logged[-1][f"revbn/model.{layer}/scale_drift"]) < 0.01


def test_layers_made_in_configure_model_are_rewritten_and_deliberate_zeros_kept(
    zero: tuple[Path, dict[str, Any]],
) -> None:
    values = zero[1]["values"]["made later"]
    assert zero[1]["verdicts"] == {"model.stem.1": "rewrite", "model.bn1": "rewrite", "model.bn2": "skip"}
    assert zero[1]["zero kept"] == ["model.bn2"]
    assert (values["model.bn1.weight"] - 0.1).abs().max() < 0.01
    assert values["model.bn2.weight"].abs().max() > 1e-3  # learnt at the full rate


def test_an_optimizer_without_such_groups_is_refused_with_code_that_makes_them(
    zero: tuple[Path, dict[str, Any]],
) -> None:
    error = zero[1]["error"]
    assert zero[1]["steps of the refused"] == 0
    code = "\n".join(line.strip() for line in error.splitlines() if line.startswith("    "))
    assert code.replace("return ", "optimizer = ").count("\n") == 1
    names: dict[str, Any] = {"torch": torch, "self": LitNet()}
    exec(code.replace("return ", "optimizer = "), names)
    assert [group["lr"] for group in names["optimizer"].param_groups] == [0.05, 0.05 / 100]
