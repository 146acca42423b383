"""Several inputs, and several places of one input, on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_revbn.core.global_moments import RankBatch, measure
from lightning_revbn.core.input_checks import InputError, InputPart
from lightning_revbn.core.input_norm import InputNorm, OnlineStandardizer
from lightning_revbn.core.joint_training import InputParts, train_together
from lightning_revbn.core.moments import Kind

CPU = torch.device("cpu")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def train(*inputs: tuple[OnlineStandardizer, list[Tensor]]) -> list[list[Tensor]]:
    parts = [InputParts("", online, [InputPart(values) for values in own]) for online, own in inputs]
    return train_together(parts, torch.float64, None, 1, CPU)


@pytest.mark.parametrize(
    "kind", [lambda x: x + 1e6, lambda x: (40 * x + 120).clamp(0, 255).byte(), lambda x: (4000 * x).short()]
)
@pytest.mark.parametrize("mode", ["batch", "running", "ema"])
def test_places_are_one_batch(kind: Any, mode: Any) -> None:
    places, joined = (OnlineStandardizer(InputNorm(3, mode=mode)) for _ in range(2))
    for step in range(3):
        first, second = (kind(noise(10 * step + place, 8, 3, 5)) for place in (0, 1))
        (results,) = train((places, [first, second[:0], second]))
        expected = joined.train(torch.cat([first, second]), dtype=torch.float64)
        torch.testing.assert_close(torch.cat(results), expected, rtol=0, atol=1e-8)
    for own, other in zip(places.statistics(), joined.statistics(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=0)
    assert places.samples == joined.samples == 48


def test_an_input_without_parts_learns_nothing_and_the_others_do() -> None:
    first, second = OnlineStandardizer(InputNorm(3)), OnlineStandardizer(InputNorm(2))
    assert train((first, []), (second, [noise(0, 8, 2)]))[0] == []
    assert not first.has_statistics
    assert second.samples == 8
    train((first, [noise(1, 8, 3)]), (second, []))
    assert first.samples == second.samples == 8


def test_a_fault_of_one_input_leaves_all() -> None:
    first, second = OnlineStandardizer(InputNorm(3)), OnlineStandardizer(InputNorm(2))
    bad = noise(0, 8, 2)
    bad[2, 1] = torch.inf
    with pytest.raises(InputError, match=r"first at index \(2, 1\)"):
        train((first, [noise(1, 8, 3)]), (second, [bad]))
    assert not first.has_statistics
    assert not second.has_statistics


@pytest.mark.parametrize("swapped", [False, True])
def test_parts_of_different_kinds_are_a_fault(swapped: bool) -> None:
    parts = [noise(0, 8, 3), noise(1, 8, 3).mul(50).char()]
    parts = parts[::-1] if swapped else parts
    joined = RankBatch.join(*(measure(part, 1) for part in parts))
    assert joined.alone().faults.tolist() == [0, 0, 1]
    agreed = [measure(part, 1, Kind.FLOAT) for part in parts]
    assert RankBatch.join(*agreed).alone().faults.tolist() == [0, 0, 1]


def test_a_frozen_input_is_normalised_beside_one_that_learns() -> None:
    frozen, learning = OnlineStandardizer(InputNorm(3, freeze_after=8)), OnlineStandardizer(InputNorm(3))
    values = noise(0, 8, 3)
    frozen.train(values)
    results, _ = train((frozen, [2 * values]), (learning, [values]))
    torch.testing.assert_close(results[0], frozen.evaluate(2 * values, dtype=torch.float64))
    assert frozen.samples == learning.samples == 8
