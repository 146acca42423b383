"""Synchronised batch norm on two gloo ranks against plain batch norm on one process with the joined batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.scripts import run_ranks
from helpers.strategies import STRATEGIES
from helpers.synchronized_cases import CASES

Results = tuple[dict[str, Any], dict[str, Any]]
Fitted = Callable[[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("batch_norm_sync.py", 2, folder)
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_statistics_are_those_of_the_joined_batch(name: str, ranks: Results) -> None:
    for of_rank in ranks:
        ours, joined = of_rank[name]["ours"], of_rank[name]["joined"]
        assert ours.keys() == joined.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, joined[key], rtol=1e-9, atol=1e-10, msg=f"{name}: {key}")
        assert of_rank[name]["is channels last"] in (None, True)


def test_half_precision_is_normalised_by_statistics_of_full_precision(ranks: Results) -> None:
    for of_rank in ranks:
        for name, result in of_rank["halves"].items():
            rounding = torch.finfo(getattr(torch, name.removeprefix("torch."))).eps
            for key in ("output", "grad"):  # of at most 4: the last rounding alone
                value, expected = result[key].double(), result[f"expected {key}"]
                torch.testing.assert_close(value, expected, rtol=rounding, atol=rounding / 16, msg=f"{name} {key}")
            statistics = result["running_mean"].double(), result["expected running_mean"]
            torch.testing.assert_close(*statistics, rtol=1e-6, atol=0)


def test_there_is_one_collective_each_way_and_none_where_nothing_is_synchronised(ranks: Results) -> None:
    for of_rank in ranks:
        assert of_rank["aside"]["collectives"] == {
            "forward": 1,
            "forward and backward": 2,
            "input without gradient": 1,
            "no grad": 1,
            "copy": 1,
            "other group": 0,
            "evaluation": 0,
            "evaluation by the batch": 0,
            "fixed statistics": 0,
            "restored": 0,
        }


def test_a_batch_of_no_samples_on_any_rank_leaves_the_running_statistics(ranks: Results) -> None:
    for of_rank in ranks:
        empty = of_rank["aside"]["empty"]
        assert all(map(torch.equal, empty["before"], empty["after"]))


def test_the_process_group_says_who_shares_a_batch(ranks: Results) -> None:
    for of_rank in ranks:
        alone, plain = of_rank["aside"]["alone"]
        assert torch.equal(alone, plain)


def test_a_forward_that_cannot_be_synchronised_is_an_error_that_names_the_layer(ranks: Results) -> None:
    for of_rank in ranks:
        assert "layer '0' cannot be synchronised: the forward of HandMade" in of_rank["aside"]["refusal"]
        assert "exclude=['0']" in of_rank["aside"]["refusal"]


def test_normalised_values_are_measured_by_the_statistics_of_all_ranks(ranks: Results) -> None:
    for of_rank in ranks:
        torch.testing.assert_close(*of_rank["aside"]["x_hat"], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    @functools.cache
    def fit(strategy: str, devices: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(strategy)
        run_ranks("fit_synchronized.py", strategy, devices, folder)
        return torch.load(folder / "result.pt", weights_only=True)

    return fit


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "ddp_spawn"])
def test_two_ranks_with_the_plugin_train_as_one_rank_with_the_joined_batch(strategy: str, fitted: Fitted) -> None:
    one, two = fitted("auto", 1), fitted(strategy, 2)  # a sharded model is synchronised in configure_model
    for key, value in one["synchronised"].items():
        torch.testing.assert_close(two["synchronised"][key], value, rtol=1e-9, atol=1e-12, msg=key)


def test_the_plugin_is_needed_for_it_and_leaves_the_model_as_it_was(fitted: Fitted) -> None:
    one, two = fitted("auto", 1), fitted("ddp", 2)
    assert all(torch.equal(one["rank by rank"][key], value) for key, value in one["synchronised"].items())
    weight = "model.6.weight"
    assert not torch.allclose(two["rank by rank"][weight], one["synchronised"][weight], rtol=1e-3)

    while_training, without = two["synchronised, while training"], two["rank by rank, while training"]
    assert (while_training["classes"], while_training["keys"]) == (without["classes"], without["keys"])
    assert while_training["own forward"] == [False, True, False, True, False, False, False]
    assert two["synchronised, afterwards"] == {"same classes": True, "own forward": [False] * 7}


def test_torchs_own_layers_in_place_of_others_are_refused(fitted: Fitted) -> None:
    refusal = fitted("ddp", 2)["refusal"]
    assert "in place of 1 batch norm layers" in refusal
    assert "'model.1' (forward of BatchNormAct2d" in refusal
