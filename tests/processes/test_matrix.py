"""All cells of the matrix on one device, and a covering sample of those with several processes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
from helpers.cells import AXES, CELLS, Cell, impossible, sample
from helpers.scripts import run_ranks

SAMPLE = sample(cell for cell in CELLS if cell.strategy != "one device")
Results = Callable[[str], dict[Cell, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    @functools.cache
    def of_strategy(strategy: str) -> dict[Cell, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("matrix")
        run_ranks("matrix.py", strategy, folder, *["--sample"] * (strategy != "one device"))
        told = json.loads((folder / "results.json").read_text())
        return {Cell(*(result.pop(axis) for axis in AXES)): result for result in told}

    return of_strategy


@pytest.mark.parametrize("strategy", AXES["strategy"])
def test_every_cell_trains_as_hand_made_groups_do_and_resumes_unless_lightning_refuses_it(
    strategy: str, results: Results
) -> None:
    told = results(strategy)
    chosen = CELLS if strategy == "one device" else SAMPLE
    assert [*told] == [cell for cell in chosen if cell.strategy == strategy]
    for cell, result in told.items():
        reason = impossible(cell)
        assert result["outcome"] == ("impossible" if reason else "ok"), (cell, result)
        assert (reason or "") in result["detail"], (cell, result)
        refused = result["trainer_arguments"] or ""
        assert ("is not supported for manual optimization" in refused) == cell.by_hand, (cell, result)


def test_every_setting_matters_and_by_hand_is_the_same_as_by_the_trainers_arguments(results: Results) -> None:
    trained = {cell: result["digest"] for cell, result in results("one device").items() if not impossible(cell)}
    assert len(trained) == 72
    manual = {digest for cell, digest in trained.items() if cell.optimization == "manual"}
    assert len(manual) == 48
    for cell, digest in trained.items():
        assert digest == trained[cell._replace(optimization="manual")]


def test_the_sample_has_every_pair_of_settings_that_lightning_allows() -> None:
    others = [cell for cell in CELLS if cell.strategy != "one device"]
    assert len(SAMPLE) < len(others) / 15
    for first, second in combinations(AXES, 2):
        for pair in product(AXES[first], AXES[second]):

            def has(cell: Cell, first: str = first, second: str = second, pair: Any = pair) -> bool:
                return (getattr(cell, first), getattr(cell, second)) == pair and not impossible(cell)

            assert any(map(has, SAMPLE)) == any(map(has, others)), pair
    for strategy in {cell.strategy for cell in others}:
        assert any(impossible(cell) for cell in SAMPLE if cell.strategy == strategy)
