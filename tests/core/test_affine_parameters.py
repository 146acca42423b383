"""The vector of all scales and shifts, and the one copy that brings it to the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import BATCH_NORMS, residual_net
from torch import nn

from lightning_revbn import find_batch_norms
from lightning_revbn.core.affine_parameters import AffineParameters


def test_scales_come_before_shifts_in_the_order_of_the_layers() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(1))
    for number, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter, number)
    parameters = AffineParameters(find_batch_norms(model))
    assert parameters.names == {"scale": ["0", "2"], "shift": ["0", "2"]}
    assert parameters.channels == {"scale": [2, 1], "shift": [2, 1]}
    np.testing.assert_array_equal(parameters.read(), [0.0, 0.0, 2.0, 1.0, 1.0, 3.0])


def test_the_values_are_read_anew_into_the_same_memory() -> None:
    model = residual_net()
    parameters = AffineParameters(find_batch_norms(model))
    before = parameters.read()
    nn.init.constant_(model.bn1.weight, 0.5)
    after = parameters.read()
    assert np.shares_memory(before, after)
    assert (after[6:12] == 0.5).all()


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float16), torch.float16),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_the_precision_holds_the_values_of_all_layers(dtypes: tuple[torch.dtype, ...], widest: torch.dtype) -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(3).to(dtype) for dtype in dtypes))
    assert AffineParameters(find_batch_norms(model)).dtype == widest


def test_a_model_without_batch_norm_has_no_values() -> None:
    parameters = AffineParameters([])
    assert not parameters
    assert parameters.read().shape == (0,)
    assert len(AffineParameters(find_batch_norms(residual_net()))) == 2 * len(BATCH_NORMS)
