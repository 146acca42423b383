"""Two gloo ranks on the CPU: update rule, rewrite and monitor under data parallel strategies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import joined_batch
import pytest
import torch
from helpers.lit import rows, trainer
from helpers.models import BATCH_NORMS
from helpers.sharded import RUNS_ON_CPU
from joined_batch import JoinedNet

from lightning_revbn import RevisitedBatchNorm

STRATEGIES = ["ddp", "ddp_spawn", *["fsdp2"] * RUNS_ON_CPU]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_as_hand_made_groups_do_and_resume_alike(strategy: str, tmp_path: Path) -> None:
    told = run("train.py", strategy, tmp_path)

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
    assert all(float(row[f"revbn/model.{layer}/normalized_absmax"]) > 1 for row in logged for layer in BATCH_NORMS)


def test_activations_of_two_ranks_equal_those_of_one_rank_with_the_joined_batch(tmp_path: Path) -> None:
    for devices in (1, 2):
        run("activations.py", str(devices), tmp_path / str(devices))
    one, two = (logged_in(tmp_path / str(devices) / "SynchronizedBatchNorm") for devices in (1, 2))
    assert len(one) == 8
    for joined, ranks in zip(one, two, strict=True):
        assert joined.keys() == ranks.keys()
        for key in joined:
            assert float(ranks[key]) == pytest.approx(float(joined[key]), rel=1e-5, abs=1e-9), (joined["step"], key)
    assert float(one[0]["revbn/normalized_absmax"]) > 3
    assert 0 < float(one[0]["revbn/normalized_over_3"]) < 0.1

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


def test_a_sharded_optimizer_is_refused_and_trains_alike_from_permanent_groups_or_with_the_rule_inside(
    tmp_path: Path,
) -> None:
    run("zero.py", tmp_path)
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


@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "ddp_spawn"])
def test_two_ranks_learn_what_one_rank_learns_from_batches_of_twice_the_size(strategy: str, tmp_path: Path) -> None:
    run("joined_batch.py", strategy, tmp_path)
    two_ranks = tmp_path / "SynchronizedBatchNorm"
    one = joined_batch.train(joined_batch.JoinedNet(), tmp_path / "one", "auto", 1)
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


def test_runs_that_are_killed_and_resumed_end_as_the_undisturbed_one() -> None:
    run("kill_and_resume.py", "--trials", 6)  # `make kill-and-resume` runs 200


def test_a_run_may_be_resumed_on_another_number_of_devices(tmp_path: Path) -> None:
    run("other_devices.py", "resume", tmp_path)
    learned = torch.load(tmp_path / "learned.pt", weights_only=True)
    assert learned.keys() == {"undisturbed", "1 then 2", "2 then 1"}
    for name, state in learned.items():
        for key, value in learned["undisturbed"].items():
            torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-14, msg=f"{name}: {key}")


def test_when_a_rank_dies_the_other_ends_and_its_checkpoint_resumes(tmp_path: Path) -> None:
    run("other_devices.py", "die", tmp_path)
    assert (tmp_path / "error.txt").read_text()  # written once nothing was found left behind
    saved = tmp_path / "step=2.ckpt"
    assert len(torch.load(saved, weights_only=True)["optimizer_states"][0]["param_groups"]) == 1

    undisturbed, resumed = JoinedNet(), JoinedNet()
    options = {"use_distributed_sampler": False}
    trainer(tmp_path, RevisitedBatchNorm(monitor=False), **options).fit(undisturbed)
    trainer(tmp_path, RevisitedBatchNorm(monitor=False), **options).fit(resumed, ckpt_path=saved)
    for key, value in undisturbed.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=1e-10, atol=1e-14, msg=key)


def run(script: str, *arguments: object) -> str:
    """Run a script of this directory and return what it told on standard error."""
    command = [sys.executable, str(Path(__file__).parent / "scripts" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def logged_in(folder: Path) -> list[dict[str, str]]:
    """Return the events of the monitor in the one log below a directory."""
    return [row for row in rows(folder) if "revbn/scale_mean" in row]
