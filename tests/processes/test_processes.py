"""Two gloo ranks on the CPU: the update rule and the rewrite under data parallel strategies."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

# The FSDP2 of torch 2.5, the lowest version that is tested, runs on CUDA alone.
STRATEGIES = ["ddp", "ddp_spawn", *(["fsdp2"] if Version(torch.__version__) >= Version("2.7") else [])]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_as_hand_made_groups_do_and_resume_alike(strategy: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("train.py")
    done = subprocess.run(
        [sys.executable, str(script), strategy, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

    states = torch.load(tmp_path / "result.pt", weights_only=True)
    for name in ("callback", "resumed"):
        for key, value in states["by hand"].items():
            assert torch.equal(states[name][key], value), (name, key)
    assert states["callback"]["model.bn1.weight"].mean() < 0.2

    # One table a fit with the callback, on rank 0 alone.
    assert done.stderr.count("batch norm layers start from a new scale") == 2

    (log,) = (tmp_path / "lightning_logs").rglob("metrics.csv")
    with log.open() as lines:
        logged = [row for row in csv.DictReader(lines) if row["revbn/scale_mean"]]
    assert [int(row["step"]) for row in logged] == list(range(8))
    assert float(logged[0]["revbn/scale_mean"]) == pytest.approx(0.1)
    assert {float(row["revbn/scale_lr"]) for row in logged} == {0.05 / 100}
