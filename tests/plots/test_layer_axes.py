from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import SymLogNorm

from lightning_revbn.plots.layer_axes import choose_axis
from lightning_revbn.plots.layer_rows import HUGE, ROWS, Row

ROW = {row.quantity: row for row in ROWS}


@pytest.mark.parametrize(
    ("quantity", "values", "kind"),
    [
        ("scale_mean", [[1.0, 1.1], [0.1, 0.2]], "log"),
        ("scale_mean", [[1.0]], "log"),
        ("scale_mean", [[1.0, 1.1], [0.0, 0.3]], "linear"),
        ("scale_mean", [[1.0, 1.1], [0.1, 0.2], [0.0, 0.02]], "symlog"),  # some start at zero, and two runs differ
        ("scale_drift", [[0.0, 0.4], [0.0, 0.1]], "linear"),
        ("scale_drift", [[0.0, 0.4], [0.0, 0.004]], "symlog"),
        ("shift_mean", [[-0.2, 0.4], [0.0, 0.004]], "linear"),
        ("shift_mean", [[-0.2, 1e6], [0.0, 0.1]], "symlog"),
        ("normalized_absmax", [[4.0, 9.0], [5.0, 8.0]], "linear"),
        ("normalized_absmax", [[4.0, 1e9], [5.0, 8.0]], "symlog"),
    ],
)
@pytest.mark.parametrize("margin", [True, False])
def test_the_axis_shows_all_values_and_has_ticks(quantity: str, values: Any, kind: str, margin: bool) -> None:
    axis = choose_axis(ROW[quantity], [np.array(own) for own in values], margin)
    everything = list(itertools.chain(*values))
    assert axis.kind == kind
    assert axis.low <= min(everything)
    assert axis.high >= max(everything)
    assert 1 <= len(axis.ticks) <= 8
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert list(axis.ticks) == sorted(set(axis.ticks))
    assert isinstance(axis.norm(), SymLogNorm) == (kind == "symlog")
    if quantity == "shift_mean" and not margin:
        assert axis.low == -axis.high


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.lists(st.floats(-1e30, 1e30, exclude_min=True, exclude_max=True), max_size=4), max_size=4),
    row=st.sampled_from(ROWS),
    margin=st.booleans(),
)
def test_any_values_have_an_axis(values: list[list[float]], row: Row, margin: bool) -> None:
    axis = choose_axis(row, [np.array(own, dtype=np.float64) for own in values], margin)
    assert math.isfinite(axis.high - axis.low)
    assert axis.low < axis.high
    assert all(axis.low - 1 / HUGE <= value <= axis.high + 1 / HUGE for own in values for value in own)
    assert 1 <= len(axis.ticks) <= 8
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    places = axis.norm()(np.array([*axis.ticks, *itertools.chain(*values)]))
    assert ((places >= -1e-9) & (places <= 1 + 1e-9)).all()
