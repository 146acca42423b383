"""Engines that leave each rank a part of the parameters or of the optimizer: FSDP1 and ZeRO, on two gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.logs import logged_in
from helpers.models import BATCH_NORMS
from helpers.scripts import run_ranks

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def fsdp1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ranks]:
    folder = tmp_path_factory.mktemp("fsdp1")
    run_ranks("fsdp1.py", folder)
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_under_fsdp1_scales_train_as_hand_made_groups_do_and_resume_alike(fsdp1: tuple[Path, Ranks]) -> None:
    _, ranks = fsdp1
    # Each scale is on one rank as a whole here, and the other rank has nothing of it.
    assert [sorted(sizes) for sizes in zip(*(rank["sizes"] for rank in ranks), strict=True)] == [[0, 6]] * 3
    states = ranks[0]["states"]
    for name in ("callback", "resumed"):
        different = {key for key, value in states["by hand"].items() if not torch.equal(states[name][key], value)}
        # FSDP1 leaves each rank its own running statistics, of which a sharded checkpoint has those of one.
        assert not {key for key in different if name == "callback" or ".running_" not in key}
    assert 0 < (states["callback"]["model.bn1.weight"] - 0.1).abs().max() < 0.1


def test_under_fsdp1_the_monitor_measures_whole_scales_by_the_models_own_names(fsdp1: tuple[Path, Ranks]) -> None:
    folder, ranks = fsdp1
    logged = logged_in(folder / "lightning_logs")
    before = ranks[0]["before every batch"][::2]  # two batches a step
    assert len(logged) == len(before) == 4
    for row, state in zip(logged, before, strict=True):
        for layer in BATCH_NORMS:
            scale, start = (of[f"model.{layer}.weight"].double() for of in (state, before[0]))
            expected = [scale.mean().item(), scale.max().item(), (scale - start).square().mean().sqrt().item()]
            found = [float(row[f"revbn/model.{layer}/scale_{statistic}"]) for statistic in ("mean", "max", "drift")]
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)
            assert float(row[f"revbn/model.{layer}/normalized_absmax"]) > 1
        assert float(row["revbn/scale_lr"]) == 0.05 / 100


def test_under_fsdp1_a_rank_without_a_part_of_a_scale_gives_the_same_verdict(fsdp1: tuple[Path, Ranks]) -> None:
    _, ranks = fsdp1
    expected = {"model.stem.1": "rewrite", "model.bn1": "rewrite", "model.bn2": "skip"}
    assert [rank["verdicts"] for rank in ranks] == [expected, expected]


def test_fsdp1_without_use_orig_params_is_refused_before_training(fsdp1: tuple[Path, Ranks]) -> None:
    for rank in fsdp1[1]:
        assert "model.stem.1 (BatchNorm2d): its scale is not a parameter but part of a flat parameter" in rank["error"]
        assert "wrap with use_orig_params=True" in rank["error"]
        assert rank["steps of the refused"] == 0


def test_a_sharded_optimizer_is_refused_and_trains_alike_from_permanent_groups_or_with_the_rule_inside(
    tmp_path: Path,
) -> None:
    run_ranks("zero.py", tmp_path)
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        refused = results["refused"]
        assert refused.startswith("RevisitedBatchNorm: ZeroRedundancyOptimizer wraps another optimizer")
        assert "scale_param_groups" in refused
        assert results["steps of the refused"] == 0
        for name, reference in (("remedy", "by hand"), ("resumed", "by hand"), ("loop", "loop by hand")):
            for key, value in results[reference].items():
                assert torch.equal(results[name][key], value), (rank, name, key)
        assert results["remedy"]["model.bn1.weight"].mean() < 0.2
