"""Views by channel: any division into pieces and any order of memory gives the same moments."""

from __future__ import annotations

import pytest
import torch
from helpers.channels import by_channel, sample

from lightning_revbn.core import channel_view as channels
from lightning_revbn.core.moments import moments


@pytest.mark.parametrize("elements", [300, 1000, 4500])
@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((2300, 3), 1), ((7, 5, 700), 1), ((3, 2, 1900), 1), ((40, 30, 3), -1), ((90, 4, 11), 1), ((5000,), None)],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float64], ids=str)
def test_pieces_of_any_size_add_up(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    channel_dim: int | None,
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = sample(shape, dtype)
    monkeypatch.setattr(channels, "_CACHED", elements / torch.get_num_threads())
    measured = moments(values, channel_dim)
    for channel, row in enumerate(by_channel(values, channel_dim).astype(float)):
        assert measured.mean[channel].item() == pytest.approx(row.mean(), rel=1e-13)
        assert measured.std[channel].item() == pytest.approx(row.std(), rel=1e-13)


def test_the_order_of_memory_does_not_matter() -> None:
    values = sample((6, 3, 9, 8), torch.uint8)
    expected = moments(values)
    for other in (
        values.to(memory_format=torch.channels_last),
        values.flip(3)[..., ::1],
        values.transpose(2, 3),
        torch.cat([values, values], 3)[..., :8],
    ):
        assert all(torch.equal(*pair) for pair in zip(moments(other).astuple(), expected.astuple(), strict=True))
    repeated = values[:1].expand(6, 3, 9, 8)
    assert torch.equal(moments(repeated).mean, moments(values[:1]).mean)
