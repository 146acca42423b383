"""The single compiled graph of a training step, against the same step operation by operation."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._inductor import metrics

from lightning_revbn import InputNorm
from lightning_revbn.core import fixed_normalizer, input_learner, input_step, integer_sums
from lightning_revbn.core.input_norm import InputError, OnlineStandardizer
from lightning_revbn.core.input_step import learn_and_standardize

LEARNED = ("count", "mean", "rest", "m2", "samples", "average_weight", "average_mean", "average_rest", "average_m2")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The batches that a single graph took."""
    taken: list[Tensor] = []

    def spy(values: Tensor, *rest: Any) -> Any:
        taken.append(values)
        return learn_and_standardize(values, *rest)

    monkeypatch.setattr(input_learner, "learn_and_standardize", spy)
    monkeypatch.setattr(input_step, "_WITHOUT", set[str]())
    return taken


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the functions that would be compiled, since compiling each case takes half a minute."""
    for module in (fixed_normalizer, input_step, integer_sums):
        monkeypatch.setattr(module, "compile_once", lambda function: function)


def both(settings: dict[str, Any]) -> tuple[OnlineStandardizer, OnlineStandardizer]:
    eager, compiled = (OnlineStandardizer(InputNorm(**settings, compile=on), scale=0.058) for on in (False, True))
    return eager, compiled


def raw(*shape: int, dtype: torch.dtype = torch.uint8, about: float = 100) -> Tensor:
    return (torch.randn(shape) * 9 + about).to(dtype)


def assert_equal(eager: OnlineStandardizer, compiled: OnlineStandardizer, values: Tensor, **options: Any) -> None:
    expected, result = (one.train(values, **options) for one in (eager, compiled))
    assert torch.equal(result, expected)
    assert result.stride() == expected.stride()
    assert result.dtype == expected.dtype
    assert torch.equal(*(one.denormalize(one.train(values), is_training=True) for one in (eager, compiled)))
    states = [one.state_dict() for one in (eager, compiled)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in LEARNED)
    assert torch.equal(*(one.evaluate(values) for one in (eager, compiled)))


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize(
    ("settings", "shape", "dtype"),
    [
        ({"num_features": 3}, (8, 3, 9, 11), torch.uint8),
        ({"num_features": 3, "mode": "ema", "momentum": 0.3}, (8, 3, 9, 11), torch.int8),
        ({"num_features": 3, "mode": "running", "clip": 1.5}, (8, 3, 9, 11), torch.uint8),
        ({"num_features": 5, "channel_dim": -1}, (4, 70, 5), torch.uint8),
        ({"num_features": 1, "channel_dim": None}, (4, 70), torch.uint8),
        ({"num_features": 70}, (4, 70), torch.uint8),
        ({"num_features": 6, "channel_dim": 0}, (6,), torch.int8),
        ({"num_features": 6, "channel_dim": 0, "input_range": 17.0, "eps": 1e-3}, (6, 40), torch.uint8),
    ],
    ids=str,
)
def test_it_learns_and_standardises_as_without_it_to_the_bit(
    settings: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, steps: list[Tensor]
) -> None:
    eager, compiled = both(settings)
    for dtype_of_result in (torch.float32, torch.bfloat16, torch.float64):
        assert_equal(eager, compiled, raw(*shape, dtype=dtype, about=60), dtype=dtype_of_result)
    assert len(steps) == 5  # the host reads the faults of the first batch


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("spread", [0, 1, 255])
def test_constant_channels_and_batches_of_one_value_are_as_without_it(spread: int, steps: list[Tensor]) -> None:
    eager, compiled = both({"num_features": 2})
    assert_equal(eager, compiled, raw(4, 2, 3, 3))
    assert_equal(eager, compiled, torch.tensor([[0, 7], [spread, 7]], dtype=torch.uint8))
    assert_equal(eager, compiled, torch.tensor([[spread, 9]], dtype=torch.uint8))
    assert len(steps) == 5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_compiler_makes_one_graph_with_the_same_bits(layout: torch.memory_format, steps: list[Tensor]) -> None:
    torch.compiler.reset()
    eager, compiled = both({"num_features": 3})
    values = raw(8, 3, 9, 11).to(memory_format=layout)
    expected = [eager.train(values) for _ in range(2)]
    assert torch.equal(compiled.train(values), expected[0])
    metrics.reset()
    assert torch.equal(compiled.train(values), expected[1])
    assert metrics.generated_kernel_count <= 12  # 150 operations without a graph
    for size in (8, 5):
        assert_equal(eager, compiled, raw(size, 3, 9, 11).to(memory_format=layout))
    assert len(steps) == 5
    learned, settings = compiled.learner.learned, compiled.settings
    table = raw(8, 3, 9, 11).flatten(2)
    arguments = (table, 8, learned.tensors(), learned.kind, settings, compiled.learner._estimator, 0.5)
    explained = torch._dynamo.explain(input_step._graph)(*arguments, torch.float32)
    assert explained.graph_count == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batches_and_images_of_changing_sizes_share_a_few_graphs(
    layout: torch.memory_format, steps: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fixed_normalizer, integer_sums):
        monkeypatch.setattr(module, "compile_once", lambda function: function)
    torch.compiler.reset()
    counter = CompileCounter()
    graph = torch.compile(input_step._graph, backend=counter, fullgraph=True)
    monkeypatch.setattr(input_step, "compile_once", lambda function: graph)
    eager, compiled = both({"num_features": 3})
    for size, height, width in product((8, 5, 1), (20, 31, 9), (20, 17)):
        assert_equal(eager, compiled, raw(size, 3, height, width).to(memory_format=layout))
    for scale in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        for one in (eager, compiled):
            one.set_scale(scale)
        assert_equal(eager, compiled, raw(8, 3, 20, 20).to(memory_format=layout))
    assert len(steps) == 2 * (18 + 7) - 1
    assert counter.frame_count <= 7  # from 9 on torch gives up, and runs the operations one by one


@pytest.mark.usefixtures("without_compiler")
def test_a_batch_that_needs_more_than_a_graph_is_measured_without_it(steps: list[Tensor]) -> None:
    values, mask = raw(4, 2, 9, 9), torch.rand(4, 1, 9, 9) < 0.5
    for settings in ({"nodata": 3}, {"channels": [1]}):
        eager, compiled = both({"num_features": 2, **settings})
        assert_equal(eager, compiled, values)
        assert_equal(eager, compiled, values)
    eager, compiled = both({"num_features": 2})
    assert_equal(eager, compiled, values, mask=mask)
    eager, compiled = both({"num_features": 2})
    assert_equal(eager, compiled, values.float())
    assert_equal(eager, compiled, values.float())
    assert_equal(*both({"num_features": 2, "mode": "fixed", "mean": [0.5, 0.5], "std": [1.0, 2.0]}), values)
    assert len(steps) == 1  # the training without a mask, after the one with a mask


@pytest.mark.usefixtures("without_compiler")
def test_a_cpu_has_a_graph_for_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_learner, "learn_and_standardize", None)
    eager, compiled = both({"num_features": 2})
    for _ in range(2):
        assert_equal(eager, compiled, raw(4, 2, 9, 9))


@pytest.mark.usefixtures("without_compiler")
def test_freeze_after_stops_it(steps: list[Tensor]) -> None:
    eager, compiled = both({"num_features": 2, "freeze_after": 12})
    for _ in range(4):
        assert_equal(eager, compiled, raw(4, 2, 9, 9))
    assert compiled.is_frozen
    assert compiled.samples == 12
    assert len(steps) == 2


@pytest.mark.usefixtures("without_compiler")
def test_other_channels_and_kinds_are_refused_as_without_it(steps: list[Tensor]) -> None:
    _, compiled = both({"num_features": 3})
    compiled.train(raw(4, 3, 9, 9))
    with pytest.raises(InputError, match="5 channels"):
        compiled.train(raw(4, 5, 9, 9))
    with pytest.raises(InputError, match="uint8"):
        compiled.train(raw(4, 3, 9, 9, dtype=torch.int8))
    assert not steps
    assert compiled.samples == 4
