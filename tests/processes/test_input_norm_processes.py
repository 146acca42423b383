"""Two and three gloo ranks with uneven and empty batches against one process with the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lit import trainer
from helpers.raw import PARTS, UnevenData, UnevenNet, raw_images, same_states
from helpers.scripts import run_ranks
from helpers.sensors import Sensors, SensorsNet, sensor_data
from helpers.strategies import STRATEGIES
from torch import Tensor

from lightning_revbn import InputNorm

CASES = [(strategy, 2, "batch", "uint8") for strategy in STRATEGIES] + [
    ("ddp", 3, "running", "uint8"),
    ("ddp", 3, "batch", "float"),
    ("ddp_spawn", 2, "ema", "float"),
    ("ddp_fork", 2, "running", "float"),
]
EVALUATION = {"sanity_check", "validate", "test", "predict", "example"}


@pytest.mark.parametrize(("strategy", "ranks", "mode", "kind"), CASES)
def test_several_ranks_learn_what_one_process_learns_from_the_joined_batch(
    strategy: str, ranks: int, mode: Any, kind: str, tmp_path: Path
) -> None:
    run_ranks("input_norm.py", strategy, ranks, mode, kind, tmp_path)
    saved = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]

    images, labels = raw_images(40)
    inputs = images.float() * 1.7 + 1e4 if kind == "float" else images
    data, network = UnevenData(1, InputNorm(num_features=3, mode=mode), (inputs, labels)), UnevenNet()
    trainer(tmp_path, num_sanity_val_steps=0).fit(network, data)
    expected = data.state_dict()["input_norm"]

    for of_rank in saved:
        for name, value in expected.items():
            assert_same(of_rank["state"][name], value, exactly=kind == "uint8", name=name)
        for name, value in network.named_parameters():
            torch.testing.assert_close(of_rank["parameters"][name], value.detach(), rtol=0, atol=1e-6)
        # One all-reduce a training step, none in the sanity check and in what came before.
        assert of_rank["collectives"]["train"] == [1] * 10
        assert all(counts == [0] * len(counts) for stage, counts in of_rank["collectives"].items() if stage != "train")
    for step in range(10):
        joined = torch.cat([of_rank["seen"][step] for of_rank in saved])
        torch.testing.assert_close(joined, network.seen["train"][step], rtol=0, atol=1e-6)
        assert [len(of_rank["seen"][step]) for of_rank in saved] == [*PARTS[ranks][step % 5]]

    if strategy in ("ddp_spawn", "ddp_fork"):
        for name, value in torch.load(tmp_path / "home.pt", weights_only=True).items():
            assert_same(value, saved[0]["state"][name], exactly=True, name=name)
    else:
        counted = [torch.load(tmp_path / f"collectives{rank}.pt", weights_only=True) for rank in range(ranks)]
        stages = {stage for of_rank in counted for stage in of_rank}
        assert stages >= (EVALUATION if strategy == "ddp" else EVALUATION - {"example"})
        assert len({len(of_rank["predict"]) for of_rank in counted}) > 1  # ranks predict different numbers of batches
        assert not any(sum(of_rank.get(stage, [])) for of_rank in counted for stage in EVALUATION)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_merge_what_they_have_measured_without_loss(ranks: int, tmp_path: Path) -> None:
    run_ranks("merged_moments.py", ranks, tmp_path)
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
    for case, first in results[0].items():
        kind, mode = case
        assert all(same_states(other[case]["shared"], first["shared"]) for other in results[1:]), case
        assert all(result[case]["collectives"] == [1] * 6 for result in results), case
        if kind in ("uint8", "int16", "int32") and mode == "batch":
            assert same_states(first["shared"], first["alone"]), case
            assert all(result[case]["worst"] == 0 for result in results), case
            continue
        shared, alone = first["shared"], first["alone"]
        names = ("average_weight", "average_mean", "average_rest", "average_m2")
        count, mean, rest, m2 = ("count", "mean", "rest", "m2") if mode == "batch" else names
        std = (alone[m2] / alone[count]).sqrt()
        assert torch.equal(shared[count], alone[count]), case
        torch.testing.assert_close(shared[m2], alone[m2], rtol=1e-12, atol=0, msg=str(case))
        offset = (shared[mean] - alone[mean]) + (shared[rest] - alone[rest])
        assert (offset.abs() <= 1e-12 * std).all(), (case, offset / std)
        # A mean of 1e8 in float64 is 1e-8 away from itself: the results are rounded as on one process, or to that.
        assert all(result[case]["worst"] <= 1e-7 for result in results), case


@pytest.fixture(scope="module", params=[2, 3])
def sensors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each rank has collected, seen and learned of three inputs."""
    folder = tmp_path_factory.mktemp("sensors")
    run_ranks("several_inputs.py", request.param, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)]


def test_three_inputs_take_one_collective_a_step_and_equal_one_process(
    sensors: list[dict[str, Any]], tmp_path: Path
) -> None:
    data, network = Sensors(1), SensorsNet()
    trainer(tmp_path, limit_val_batches=0).fit(network, data)
    expected = data.state_dict()["input_norm"]
    for of_rank in sensors:
        assert of_rank["collectives"] == [1] * 10
        for name, state in expected.items():
            assert same_states(of_rank["state"][name], sensors[0]["state"][name])
            for key, value in state.items():
                # A mean of 1e6 has a rest below 1e-10, which rounding moves by 1e-13 of a standard deviation of 1.
                if name == "radar" and key.endswith("rest"):
                    torch.testing.assert_close(of_rank["state"][name][key], value, rtol=0, atol=1e-12)
                else:
                    assert_same(of_rank["state"][name][key], value, exactly=name != "radar", name=f"{name} {key}")
    for step, whole in enumerate(network.seen):
        for place, expected_view in enumerate(whole["image"]):
            joined = torch.cat([of_rank["seen"][step]["image"][place] for of_rank in sensors])
            assert torch.equal(joined, expected_view)
        for name in ("radar", "range"):
            joined = torch.cat([of_rank["seen"][step][name] for of_rank in sensors])
            torch.testing.assert_close(joined, whole[name], rtol=0, atol=1e-6)


def test_ranks_share_a_pass_before_training(sensors: list[dict[str, Any]]) -> None:
    collected, raw = [of_rank["collected"] for of_rank in sensors], sensor_data()
    for name, joined in (("image", torch.cat(raw["image"]).double()), ("radar", raw["radar"])):
        values = joined.transpose(0, 1).flatten(1)
        for of_rank in collected:
            assert same_states(of_rank[name], collected[0][name])
            assert of_rank[name]["count"].tolist() == [values.shape[1]] * len(values)
            torch.testing.assert_close(of_rank[name]["mean"], values.mean(1), rtol=1e-12, atol=0)
            variance = of_rank[name]["m2"] / of_rank[name]["count"]
            torch.testing.assert_close(variance, values.var(1, correction=0), rtol=1e-8, atol=0)
    assert collected[0]["range"]["samples"] == 40
    assert collected[0]["image"]["samples"] == 80


def test_the_front_layer_on_two_ranks_equals_batch_norm_of_the_joined_batch(tmp_path: Path) -> None:
    run_ranks("front_layer.py", 2, tmp_path)
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for kind in ("uint8", "float"):
        ours, hand_made = results[0][kind]["layer"], results[0][kind]["joined"]
        gathered = {name: torch.cat([result[kind]["layer"][name] for result in results]) for name in ("output", "grad")}
        for name, value in {**ours, **gathered}.items():
            torch.testing.assert_close(value, hand_made[name], rtol=1e-5, atol=2e-7, msg=f"{kind} {name}")
    assert results[0]["collectives"] == [1, 2]  # forwards; backwards too, where the input needs a gradient
    # One value a channel on all ranks together has no variance, which torch's layers refuse too.
    for result in results:
        for single in result["single"]:
            assert "more than 1 value per channel when training, got a single value on all ranks" in single["error"]
            assert single["unchanged"]
            assert single["goes on"]
    # A Trainer with sync_batchnorm=True leaves the layer as it is, and it trains.
    assert results[0]["class"] == "InputBatchNorm"
    assert results[0]["trained"] == results[1]["trained"]
    assert results[0]["trained"]["weight"] != [0.058] * 3


def test_an_error_on_one_rank_is_an_error_on_all_and_leaves_the_statistics(tmp_path: Path) -> None:
    run_ranks("faults.py", 2, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys() == {"NaN", "infinity", "another kind", "beyond 32 bits", "first step"}
    for name in first:
        for result in (first[name], second[name]):
            assert result["error"], name
            assert result["unchanged"], name
            assert result["goes on"], name
    assert "of another rank" in first["NaN"]["error"]
    assert "first at index (1, 2)" in second["NaN"]["error"]


def assert_same(value: Any, expected: Any, *, exactly: bool, name: str) -> None:
    if not isinstance(expected, Tensor):
        assert value == expected, name
    elif exactly:
        assert torch.equal(value, expected), name
    else:
        # The rest of a mean of 1e4 is below 1e-12; a difference of 1e-14 there is one of 1e-18 in the mean.
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14 if name.endswith("rest") else 0, msg=name)
