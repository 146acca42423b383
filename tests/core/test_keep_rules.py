"""Rules that are applied piece by piece, against the same rules applied to whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_revbn.core.channel_view import channel_view, pieces
from lightning_revbn.core.input_masks import kept_values, valid_values
from lightning_revbn.core.keep_rules import KeepRules, blank_
from lightning_revbn.core.moments import moments

GENERATOR = torch.Generator().manual_seed(0)
SHAPE = (7, 5, 90, 11)
DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("has_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("nodata", [(), (0,), (-9999, 0, 7.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_keep_what_whole_tensors_keep(dtype: Any, nodata: Any, has_mask: bool, memory_format: Any) -> None:
    values = torch.randint(0, 9, SHAPE, generator=GENERATOR).to(dtype).contiguous(memory_format=memory_format)
    if dtype.is_floating_point:
        values[torch.rand(SHAPE, generator=GENERATOR) < 0.2] = torch.nan
    mask = torch.rand(7, 1, 90, 11, generator=GENERATOR) < 0.7 if has_mask else None
    spared = torch.tensor([False, True, False, False, True])
    valid = valid_values(values, mask, [*nodata])
    wanted = kept_values(values, valid, True, ~spared.view(1, 5, 1, 1))
    view = channel_view(values, 1)
    masks = KeepRules(mask, nodata, True, spared).on(values, view, 1)
    if wanted is None:
        assert masks is None
        return
    wanted_view = channel_view(wanted.expand(SHAPE), 1, like=values)
    for index, part in enumerate(view.parts):
        for at in pieces(part, 3000):
            expected = wanted_view.parts[index][at]
            if masks is None:  # no value of this dtype equals a number
                assert expected.all()
                continue
            assert torch.equal(masks.kept(index, at, torch.int64), expected.long())
            assert torch.equal(masks.kept_bits(index, at, torch.float32), -expected.int())


@pytest.mark.parametrize("fill", [0.0, -7.25, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_and_infinity_are_replaced_and_every_other_bit_stays(dtype: torch.dtype, fill: float) -> None:
    numbers = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40, -3e38, 2.5], dtype=dtype)
    replaced, bits = numbers.clone(), torch.zeros(7, dtype=torch.int32 if dtype == torch.float32 else torch.int64)
    blank_(replaced, bits, fill)
    assert torch.equal(replaced, torch.full_like(numbers, fill))
    same = numbers.clone()
    blank_(same, ~torch.zeros_like(bits), fill)
    assert torch.equal(same.view(bits.dtype), numbers.view(bits.dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32], ids=str)
def test_values_of_a_long_row_are_counted_exactly(dtype: torch.dtype) -> None:
    values = torch.ones(1, 1, 2**24 + 11, dtype=dtype)
    mask = torch.ones_like(values, dtype=torch.bool)
    mask[..., 5] = False
    measured = moments(values, mask=mask)
    assert measured.count.item() == 2**24 + 10
    assert (measured.mean.item(), measured.m2.item()) == (1.0, 0.0)
