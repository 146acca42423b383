"""Numbers in each of the forms in which users have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_revbn.core.arguments import check_divisor, check_multiplier, check_scale

FORMS: list[Any] = [4, 4.0, np.float32(4), np.float64(4), np.int64(4), np.array(4.0), torch.tensor(4.0), "4", "4e0"]
NO_NUMBERS: list[Any] = ["big", "", None, True, np.True_, np.array(True), [4.0], np.array([4.0]), 4j, np.complex64(4)]
CHECKS = [check_divisor, check_multiplier, check_scale]
each_check = pytest.mark.parametrize("check", CHECKS)


@each_check
@pytest.mark.filterwarnings("ignore:.*the method starts batch norm scales below 1:UserWarning")
@pytest.mark.parametrize("value", FORMS, ids=repr)
def test_a_number_is_taken_in_every_form(check: Any, value: Any) -> None:
    assert check(value) == 4.0
    assert type(check(value)) is float


@each_check
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(check: Any, value: Any) -> None:
    with pytest.raises(TypeError, match="must be a number"):
        check(value)


@each_check
@pytest.mark.parametrize("value", [0, -1.0, "-1e-1", "nan", float("inf"), np.float32("nan")], ids=repr)
def test_a_number_that_is_not_finite_and_positive_is_refused(check: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="must be finite and positive"):
        check(value)


def test_a_mapping_takes_the_same_numbers() -> None:
    assert check_scale({"a": "1e-1", "b": np.float64(0.2)}) == {"a": 0.1, "b": 0.2}
