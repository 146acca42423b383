"""Which saved statistics are refused, in one line and with nothing taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.raw import IMAGES, same_states

from lightning_revbn import InputNorm
from lightning_revbn.core.input_norm import OnlineStandardizer

State = dict[str, Any]
TENSORS = ("count", "mean", "rest", "m2", "average_weight", "average_mean", "average_rest", "average_m2")
NEVER_NEGATIVE = ("count", "m2", "average_weight", "average_m2", "samples")


def saved(mode: Any = "ema", images: torch.Tensor = IMAGES) -> State:
    given = {"mean": [0.5] * 3, "std": [0.2] * 3} if mode == "fixed" else {}
    standardizer = OnlineStandardizer(InputNorm(3, mode=mode, **given))
    standardizer.train(images)
    return standardizer.state_dict()


def with_value(name: str, value: Any) -> Callable[[], Any]:
    return lambda: {**saved(), name: value}


def with_element(name: str, value: float) -> Callable[[], Any]:
    def changed() -> State:
        state = saved()
        state[name].view(-1)[-1] = value
        return state

    return changed


def without(name: str) -> Callable[[], Any]:
    return lambda: {key: value for key, value in saved().items() if key != name}


CONSTANTS = torch.tensor([[0.5] * 3, [0.2] * 3], dtype=torch.float64)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "are a NoneType, not a mapping"),
    "list": (lambda: [1], "are a list, not a mapping"),
    "empty": (dict, "lack mode, kind, scale"),
    **{f"no {name}": (without(name), f"lack {name}") for name in saved()},
    **{f"{name} NaN": (with_element(name, torch.nan), f"{name} is not finite") for name in (*TENSORS, "samples")},
    **{f"{name} infinite": (with_element(name, torch.inf), f"{name} is not finite") for name in ("mean", "m2", "rest")},
    **{f"{name} negative": (with_element(name, -1.0), f"{name} is negative") for name in NEVER_NEGATIVE},
    "four channels": (lambda: {**saved(), **dict.fromkeys(TENSORS, torch.ones(4).double())}, "are of 4 channels"),
    "count of two dimensions": (with_value("count", torch.ones(3, 1).double()), r"of shape \(3, 1\), not \(3,\)"),
    "one mean for all": (with_value("mean", torch.ones(1).double()), r"mean is of shape \(1,\)"),
    "m2 of more": (with_value("m2", torch.ones(3, 3).double()), r"m2 is of shape \(3, 3\)"),
    "many samples": (with_value("samples", torch.ones(2).double()), r"samples is of shape \(2,\)"),
    "float32": (with_value("mean", torch.ones(3)), "mean is torch.float32, not torch.float64"),
    "half": (with_value("m2", torch.ones(3).half()), "m2 is torch.float16"),
    "integers": (with_value("count", torch.ones(3).long()), "count is torch.int64"),
    "complex": (with_value("mean", torch.ones(3, dtype=torch.complex128)), "mean is torch.complex128"),
    "list of numbers": (with_value("mean", [1.0, 2.0, 3.0]), "mean is a list, not a tensor"),
    "array": (with_value("mean", np.ones(3)), "mean is a ndarray, not a tensor"),
    "plain samples": (with_value("samples", 40.0), "samples is a float, not a tensor"),
    "meta": (with_value("mean", torch.ones(3, dtype=torch.float64, device="meta")), "mean is a tensor without values"),
    "sparse": (with_value("mean", torch.ones(3).double().to_sparse()), "mean is a tensor without values"),
    "unknown mode": (with_value("mode", "median"), "mode is 'median'"),
    "mode by number": (with_value("mode", 1), "mode is 1"),
    "unknown kind": (with_value("kind", "TEXT"), "kind is 'TEXT'"),
    "kind by number": (with_value("kind", 1), "kind is 1"),
    "kind forgotten": (with_value("kind", "UNKNOWN"), "kind is UNKNOWN, although values were seen"),
    **{f"scale {value}": (with_value("scale", value), "scale is") for value in (0.0, -1.0, torch.nan, "1", True)},
    **{
        f"range {value}": (with_value("input_range", value), "input_range is") for value in (0, -255.0, torch.inf, None)
    },
    "range too far": (with_value("input_range", 1e-300), "input_range is 1e-300, too far from 255.0"),
    "channels by name": (with_value("channels", ["red"]), r"channels is \['red'\]"),
    "channels as a tensor": (with_value("channels", torch.arange(3)), "channels is tensor"),
    "other channels": (
        with_value("channels", [0, 2]),
        r"are of a run with InputNorm\(channels=\[0, 2\]\).*channels=None",
    ),
    "half a value": (with_element("count", 0.5), "count is not whole numbers"),
    "half a sample": (with_element("samples", 0.5), "samples is not whole numbers"),
    "no samples": (with_element("samples", 0.0), "samples is 0, although values were seen"),
    "weight above 1": (with_element("average_weight", 1.5), "average_weight is above 1"),
    "mean of nothing": (with_element("count", 0.0), "mean is of channels in which count is 0"),
    "average of nothing": (with_element("average_weight", 0.0), "average_mean is of channels in which average_weight"),
    "constants of a learner": (with_value("constants", CONSTANTS), "constants is given in mode 'ema'"),
    "no constants": (lambda: {**saved("fixed"), "constants": None}, "constants is a NoneType, not a tensor"),
    "constants of two": (lambda: {**saved("fixed"), "constants": CONSTANTS[:, :2]}, r"constants is of shape \(2, 2\)"),
    "negative std": (lambda: {**saved("fixed"), "constants": -CONSTANTS}, "constants is a negative std"),
    "a learner's mode": (with_value("mode", "fixed"), "constants is a NoneType"),
    "fixed with a kind": (lambda: {**saved("fixed"), "kind": "FLOAT"}, "kind is FLOAT in mode 'fixed'"),
}


@pytest.mark.parametrize("mode", ["batch", "running", "ema", "fixed"])
def test_a_state_is_for_the_same_channels_in_every_mode(mode: Any) -> None:
    given = {"mean": [0.5] * 3, "std": [0.2] * 3} if mode == "fixed" else {}
    first, same, other = (
        OnlineStandardizer(InputNorm(3, mode=mode, channels=of, **given)) for of in ([0, 2], [-1, 0], [0])
    )
    first.train(IMAGES)
    same.load_state_dict(first.state_dict())
    assert torch.equal(same.evaluate(IMAGES), first.evaluate(IMAGES))
    with pytest.raises(ValueError, match=r"InputNorm\(channels=\[0, 2\]\), and this run has channels=\[0\]"):
        other.load_state_dict(first.state_dict())
    everything = OnlineStandardizer(InputNorm(3, mode=mode, channels=[0, 1, 2], **given))
    everything.load_state_dict(OnlineStandardizer(InputNorm(3, mode=mode, **given)).state_dict())  # None is all


def test_there_are_many() -> None:
    assert len(BAD) >= 55


@pytest.mark.parametrize("name", BAD)
def test_a_bad_state_is_refused_in_one_line_and_leaves_everything(name: str) -> None:
    make, message = BAD[name]
    standardizer = OnlineStandardizer(InputNorm(3, mode="ema"))
    standardizer.train(IMAGES[:8])
    before, expected = standardizer.state_dict(), standardizer.evaluate(IMAGES)
    with pytest.raises(ValueError, match=message) as error:
        standardizer.load_state_dict(make())
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("the saved input statistics")
    assert same_states(standardizer.state_dict(), before)
    assert torch.equal(standardizer.evaluate(IMAGES), expected)


@pytest.mark.parametrize("mode", ["batch", "running", "ema", "fixed"])
@pytest.mark.parametrize("seen", [0, 40])
def test_a_good_state_is_taken_over_to_the_bit(mode: Any, seen: int) -> None:
    given = {"mean": [0.5] * 3, "std": [0.2] * 3} if mode == "fixed" else {}
    state = saved(mode, IMAGES[:seen])
    other = OnlineStandardizer(InputNorm(3, mode=mode, **given))
    other.load_state_dict(state)
    assert same_states(other.state_dict(), state)


def test_channels_that_were_never_seen_are_no_fault() -> None:
    standardizer, other = OnlineStandardizer(InputNorm(3)), OnlineStandardizer(InputNorm(3))
    standardizer.train(IMAGES, torch.tensor([True, False, True]).view(1, 3, 1, 1))
    other.load_state_dict(standardizer.state_dict())
    assert same_states(other.state_dict(), standardizer.state_dict())
