"""Two gloo ranks on the CPU: update rule, rewrite and monitor under data parallel strategies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.joined_batch import JoinedNet, train_joined
from helpers.logs import logged_in
from helpers.models import BATCH_NORMS
from helpers.scripts import run_ranks
from helpers.strategies import STRATEGIES


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_as_hand_made_groups_do_and_resume_alike(strategy: str, tmp_path: Path) -> None:
    told = run_ranks("train.py", strategy, tmp_path)

    states = torch.load(tmp_path / "result.pt", weights_only=True)
    for name in ("callback", "resumed"):
        for key, value in states["by hand"].items():
            assert torch.equal(states[name][key], value), (name, key)
    assert states["callback"]["model.bn1.weight"].mean() < 0.2

    # One table a fit with the callback, on rank 0 alone.
    assert told.count("batch norm layers start from a new scale") == 2

    logged = logged_in(tmp_path / "lightning_logs")
    assert [int(row["step"]) for row in logged] == list(range(8))
    assert float(logged[0]["revbn/scale_mean"]) == pytest.approx(0.1)
    assert {float(row["revbn/scale_lr"]) for row in logged} == {0.05 / 100}
    assert {float(row["revbn/shift_lr"]) for row in logged} == {0.05 * 10}
    assert all(float(row[f"revbn/model.{layer}/normalized_absmax"]) > 1 for row in logged for layer in BATCH_NORMS)


def test_activations_of_two_ranks_equal_those_of_one_rank_with_the_joined_batch(tmp_path: Path) -> None:
    for devices in (1, 2):
        run_ranks("activations.py", str(devices), tmp_path / str(devices))
    one, two = (logged_in(tmp_path / str(devices) / "SynchronizedBatchNorm") for devices in (1, 2))
    assert len(one) == 8
    for joined, ranks in zip(one, two, strict=True):
        assert joined.keys() == ranks.keys()
        for key in joined:
            assert float(ranks[key]) == pytest.approx(float(joined[key]), rel=1e-5, abs=1e-9), (joined["step"], key)
    assert float(one[0]["revbn/normalized_absmax"]) > 3
    assert 0 < float(one[0]["revbn/normalized_over_3"]) < 0.1

    # Statistics of the call of batch norm itself, which two ranks share.
    for joined, split in zip(*(logged_in(tmp_path / ranks / "AmidArithmetic") for ranks in "12"), strict=True):
        for key in joined:
            assert float(split[key]) == pytest.approx(float(joined[key]), rel=1e-5, abs=1e-9), (joined["step"], key)

    tables = {ranks: torch.load(tmp_path / str(ranks) / "tables.pt", weights_only=True) for ranks in (1, 2)}
    torch.testing.assert_close(tables[2]["SyncBatchNorm"], tables[1]["SyncBatchNorm"], rtol=1e-6, atol=0)
    # Layers that are not synchronised normalise the batch of their own rank.
    first = logged_in(tmp_path / "2" / "BatchNorm2d")[0]
    for layer, expected in zip(
        [*(f"model.{name}/" for name in BATCH_NORMS), ""], tables[1]["rank by rank"].T, strict=True
    ):
        logged = [float(first[f"revbn/{layer}normalized_{name}"]) for name in ("absmax", "over_3")]
        assert logged == pytest.approx(expected.tolist(), rel=1e-6)
    assert not torch.allclose(tables[1]["rank by rank"], tables[1]["joined"], rtol=1e-3)


@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "ddp_spawn"])
def test_two_ranks_learn_what_one_rank_learns_from_batches_of_twice_the_size(strategy: str, tmp_path: Path) -> None:
    run_ranks("joined_batch.py", strategy, tmp_path)
    two_ranks = tmp_path / "SynchronizedBatchNorm"
    one = train_joined(JoinedNet(), tmp_path / "one", "auto", 1)
    for rank in range(2):
        two = torch.load(two_ranks / f"rank{rank}.pt", weights_only=True)
        assert two.keys() == one.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-10, atol=1e-12, msg=key)
    for joined, ranks in zip(logged_in(tmp_path / "one"), logged_in(two_ranks), strict=True):
        assert joined.keys() == ranks.keys()
        for key in joined:
            assert float(ranks[key]) == pytest.approx(float(joined[key]), rel=1e-10, abs=1e-12), (joined["step"], key)

    # The scales have learned, and that rightly only with the other rank's part of the batch.
    assert (one["model.bn1.weight"] - 0.1).abs().min() > 1e-6
    apart = torch.load(tmp_path / "BatchNorm2d" / "rank0.pt", weights_only=True)
    assert not torch.allclose(apart["model.bn1.weight"] - 0.1, one["model.bn1.weight"] - 0.1, rtol=0.1)
