from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import BATCH_NORMS, AmidArithmetic, images, residual_net
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, SplitBatchNorm2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from lightning_revbn import find_batch_norms
from lightning_revbn.core.activations import ActivationHooks, NormalizedActivations, compute_x_hat
from lightning_revbn.core.next_call import EveryCall


def seen(model: nn.Module, forward: Callable[[], Any]) -> tuple[list[float], list[float]]:
    """Greatest |x_hat| and share of |x_hat| > 3 of every layer, and of all, in a forward pass."""
    records = find_batch_norms(model)
    metric = NormalizedActivations(len(records))
    with ActivationHooks(records, metric):
        forward()
    absmax, over_3 = metric.compute()
    return absmax.tolist(), over_3.tolist()


def recorded_inputs(model: nn.Module, forward: Callable[[], Any]) -> list[np.ndarray]:
    """What every layer got, in float64; its normalised values are computed from it by numpy."""
    inputs: list[np.ndarray] = []
    handles = [
        record.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().double().numpy()))
        for record in find_batch_norms(model)
    ]
    forward()
    for handle in handles:
        handle.remove()
    return inputs


def by_numpy(inputs: np.ndarray, eps: float = 1e-5, mean: Any = None, variance: Any = None) -> np.ndarray:
    """x_hat of the batch, or with given statistics."""
    flat = np.moveaxis(inputs, 1, 0).reshape(inputs.shape[1], -1)
    mean = flat.mean(1) if mean is None else np.asarray(mean)
    variance = flat.var(1) if variance is None else np.asarray(variance)
    return (flat - mean[:, None]) / np.sqrt(variance[:, None] + eps)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(8, 3), (6, 1), (5, 2, 7), (4, 3, 5, 5), (2, 3, 3, 4, 4)]),
    affine=st.booleans(),
    training=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_both_equal_numpys_from_the_recorded_inputs(
    shape: tuple[int, ...], affine: bool, training: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    layer = kind(shape[1], affine=affine)
    nn.init.normal_(layer.running_mean)
    nn.init.uniform_(layer.running_var, 0.1, 2.0)
    layer.to(dtype).train(training)
    inputs = (torch.randn(shape) * 2 + 5).to(dtype)
    statistics = {} if training else {"mean": layer.running_mean.double(), "variance": layer.running_var.double()}
    reference = np.abs(by_numpy(inputs.double().numpy(), **statistics))
    absmax, over_3 = seen(layer, lambda: layer(inputs))
    assert absmax[0] == pytest.approx(reference.max(), rel=1e-5)
    uncertain = np.mean(np.abs(reference - 3) < 1e-4)
    assert over_3[0] == pytest.approx(np.mean(reference > 3), abs=uncertain + 1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_a_networks_layers_equal_numpys_whatever_their_scale(training: bool) -> None:
    model = residual_net(zero_init_residual=True)
    model(images(64, seed=3)[0])  # running statistics away from 0 and 1
    model.train(training)
    inputs = images(64)[0]

    def forward() -> None:
        with torch.no_grad():
            model(inputs)

    before = {name: (bn.running_mean.double(), bn.running_var.double()) for name, bn in layers(model)}
    batches = recorded_inputs(model, forward)
    for name, bn in layers(model):  # the recording pass has moved them
        bn.running_mean.copy_(before[name][0])
        bn.running_var.copy_(before[name][1])
    absmax, over_3 = seen(model, forward)
    reference = [
        np.abs(by_numpy(batch) if training else by_numpy(batch, mean=before[name][0], variance=before[name][1]))
        for name, batch in zip(BATCH_NORMS, batches, strict=True)
    ]
    assert absmax[:-1] == pytest.approx([values.max() for values in reference], rel=1e-5)
    assert over_3[:-1] == pytest.approx([(values > 3).mean() for values in reference], abs=1e-6)
    assert absmax[-1] == max(absmax[:-1])
    everything = np.concatenate([values.ravel() for values in reference])
    assert over_3[-1] == pytest.approx((everything > 3).mean(), abs=1e-6)


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def test_x_hat_is_what_the_layer_multiplies_with_its_scale() -> None:
    inputs = torch.randn(16, 4, 5, 5).mul(3).add(100).to(memory_format=torch.channels_last)
    for layer in (nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False).eval(), nn.BatchNorm2d(4, eps=0.1)):
        nn.init.normal_(layer.weight)
        x_hat = compute_x_hat(layer, inputs)
        by_layer = layer(inputs) / layer.weight[:, None, None]
        assert torch.allclose(x_hat, by_layer, atol=1e-4)


def test_an_activation_inside_the_layer_and_frozen_statistics_are_seen_through() -> None:
    inputs = torch.randn(8, 4, 5, 5)
    act, plain = BatchNormAct2d(4), nn.BatchNorm2d(4)
    assert seen(act, lambda: act(inputs)) == seen(plain, lambda: plain(inputs))
    frozen = FrozenBatchNorm2d(4)
    frozen.running_mean.fill_(1.0)
    frozen.running_var.fill_(4.0)
    absmax, _ = seen(frozen, lambda: frozen(inputs))
    assert absmax[0] == pytest.approx(((inputs - 1) / (4 + frozen.eps) ** 0.5).abs().max().item())


def test_large_offsets_do_not_blur_the_values() -> None:
    layer = nn.BatchNorm1d(2)
    inputs = torch.randn(4096, 2) + 1e4
    absmax, _ = seen(layer, lambda: layer(inputs))
    assert absmax[0] == pytest.approx(np.abs(by_numpy(inputs.double().numpy())).max(), rel=1e-3)


def test_a_layer_that_runs_twice_is_measured_over_both() -> None:
    layer = nn.BatchNorm1d(1).eval()
    absmax, over_3 = seen(layer, lambda: (layer(torch.tensor([[1.0], [2.0]])), layer(input=torch.tensor([[5.0]]))))
    assert absmax[0] == pytest.approx(5.0, rel=1e-4)
    assert over_3[0] == pytest.approx(1 / 3)


def test_a_layer_that_does_not_run_has_no_share_and_none_of_it_is_in_the_whole() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1)).eval()
    _, over_3 = seen(model, lambda: model[1](torch.tensor([[5.0], [0.0]])))
    assert np.isnan(over_3[0])
    assert over_3[1:] == [0.5, 0.5]


def test_a_value_that_is_not_a_number_shows() -> None:
    layer = nn.BatchNorm1d(1).eval()
    absmax, _ = seen(layer, lambda: layer(torch.tensor([[float("nan")], [1.0]])))
    assert np.isnan(absmax[0])


def test_empty_batches_are_nothing_to_measure() -> None:
    layer = nn.BatchNorm1d(2).eval()
    _, over_3 = seen(layer, lambda: layer(torch.empty(0, 2)))
    assert np.isnan(over_3).all()


def test_neither_outputs_gradients_nor_running_statistics_change() -> None:
    results = []
    for watched in (False, True):
        model = residual_net()
        records = find_batch_norms(model) if watched else []
        with ActivationHooks(records, NormalizedActivations(len(records))):
            model(images(8)[0]).square().sum().backward()
        results.append([*model.state_dict().values(), *(parameter.grad for parameter in model.parameters())])
    for plain, seen_ in zip(*results, strict=True):
        assert torch.equal(plain, seen_)


def test_nothing_is_kept_of_the_activations_and_no_hook_stays() -> None:
    model = residual_net()
    records = find_batch_norms(model)
    metric = NormalizedActivations(len(records))
    inputs: list[weakref.ref[Tensor]] = []
    for record in records:
        record.module.register_forward_hook(lambda _, args, output: inputs.extend(map(weakref.ref, (args[0], output))))
    with ActivationHooks(records, metric), torch.no_grad():
        model(images(64)[0])
    assert len(inputs) == 2 * len(records)
    assert [ref() for ref in inputs if ref() is not None] == []
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert {state.numel() for state in metric.metric_state.values()} == {len(records)}


def test_under_autocast_values_are_measured_in_full_precision() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    inputs = torch.randn(32, 4) * 20

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(inputs)

    (batch,) = recorded_inputs(model, forward)
    absmax, _ = seen(model, forward)
    assert absmax[0] == pytest.approx(np.abs(by_numpy(batch)).max(), rel=1e-5)


def test_transforms_of_torch_func_are_left_alone() -> None:
    layer = nn.BatchNorm1d(2).eval()
    _, over_3 = seen(layer, lambda: torch.func.vmap(layer)(torch.randn(3, 4, 2)))
    assert np.isnan(over_3).all()


def test_sharded_inputs_are_left_alone() -> None:
    class Sharded(Tensor):
        """Has what a DTensor is known by."""

        def full_tensor(self) -> Tensor:
            raise AssertionError("a collective that other ranks may not take part in")

    layer = nn.BatchNorm1d(2).eval()
    _, over_3 = seen(layer, lambda: layer(torch.randn(4, 2).as_subclass(Sharded)))
    assert np.isnan(over_3).all()


def test_what_a_layer_refuses_is_refused_in_its_own_words() -> None:
    layer = nn.BatchNorm2d(2)
    for inputs in (torch.randn(2), torch.randn(4, 2)):
        with pytest.raises(ValueError, match="expected 4D input"):
            seen(layer, lambda inputs=inputs: layer(inputs))


def test_compiled_code_is_left_alone() -> None:
    layer = nn.BatchNorm1d(2).eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    _, over_3 = seen(layer, lambda: compiled(torch.randn(4, 2)))
    assert np.isnan(over_3).all()


def test_recomputed_activations_do_not_shift_the_share() -> None:
    layer = nn.BatchNorm1d(2).eval()
    inputs = torch.randn(500, 2, requires_grad=True)
    plain = seen(layer, lambda: layer(inputs))
    run = torch.utils.checkpoint.checkpoint
    assert seen(layer, lambda: run(layer, inputs, use_reentrant=False).sum().backward()) == plain


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_checkpointed_do_not_weigh_twice_in_the_whole(reentrant: bool) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(500, 2, requires_grad=True)
    shares: list[list[float]] = []
    for checkpointed in (False, True):
        first, second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        model = nn.Sequential(first, nn.ReLU(), second)

        def forward(first: nn.Module = first, second: nn.Module = second, checkpointed: bool = checkpointed) -> None:
            run = torch.utils.checkpoint.checkpoint
            hidden = run(first, inputs**3, use_reentrant=reentrant) if checkpointed else first(inputs**3)
            second(hidden.relu()).square().sum().backward()

        shares.append(seen(model, forward)[1])
    assert shares[0] == shares[1]
    assert shares[0][0] != shares[0][1]


@pytest.mark.parametrize("training", [True, False])
def test_arithmetic_before_and_behind_batch_norm_is_seen_through(training: bool) -> None:
    layer = AmidArithmetic(4)
    nn.init.uniform_(layer.weight, 0.05, 0.2)
    nn.init.normal_(layer.running_mean)
    layer.train(training)
    inputs = torch.randn(64, 4, 3, 3)
    known = {} if training else {"mean": layer.running_mean.clone(), "variance": layer.running_var.clone()}
    reference = np.abs(by_numpy((3 * inputs.sin()).double().numpy(), **known))
    absmax, over_3 = seen(layer, lambda: layer(inputs))
    assert absmax[0] == pytest.approx(reference.max(), rel=1e-5)
    assert over_3[0] == pytest.approx((reference > 3).mean(), abs=1e-6)


def test_a_layer_inside_another_is_measured_by_itself() -> None:
    layer = SplitBatchNorm2d(3, num_splits=2)  # its children normalise the other parts of the batch
    inputs = torch.randn(16, 3, 4, 4)
    inputs[8:] *= 5
    inputs[8, 0, 0, 0] = 100.0
    absmax, over_3 = seen(layer, lambda: layer(inputs))
    parts = [np.abs(by_numpy(part.double().numpy())) for part in inputs.split(8)]
    assert absmax[:2] == pytest.approx([part.max() for part in parts], rel=1e-5)
    assert over_3[:2] == pytest.approx([(part > 3).mean() for part in parts], abs=1e-6)


def test_a_forward_that_the_user_has_put_in_a_layer_is_watched_and_left() -> None:
    layer = nn.BatchNorm2d(4)
    original = layer.forward
    layer.forward = lambda input: 0.1 * original(input)  # type: ignore[method-assign]
    own, plain = layer.forward, nn.BatchNorm2d(4)
    inputs = torch.randn(16, 4, 3, 3)
    assert seen(layer, lambda: layer(inputs)) == seen(plain, lambda: plain(inputs))
    assert layer.forward is own


def test_a_copy_that_is_made_meanwhile_is_not_watched_and_an_error_leaves_the_layer_as_it_was() -> None:
    layer = AmidArithmetic(4)
    records = find_batch_norms(layer)
    metric = NormalizedActivations(1)
    with ActivationHooks(records, metric):
        duplicate = copy.deepcopy(layer)
        stored = pickle.loads(pickle.dumps(layer))
        with pytest.raises(RuntimeError):
            layer(torch.randn(2, 5, 3, 3))
        count = metric.count.item()
        for other in (duplicate, stored):
            torch.testing.assert_close(other(torch.ones(4, 4, 2, 2)), torch.ones(4, 4, 2, 2))
        assert metric.count.item() == count
    assert "forward" not in vars(layer)
    assert duplicate.running_mean is not layer.running_mean


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_two_watches_of_one_layer_end_in_any_order(first_ends_first: bool) -> None:
    layer = AmidArithmetic(4)
    records = find_batch_norms(layer)
    metrics = [NormalizedActivations(1), NormalizedActivations(1)]
    watches = [ActivationHooks(records, metric) for metric in metrics]
    layer(torch.randn(16, 4, 3, 3))
    for watch in watches if first_ends_first else reversed(watches):
        watch.remove()
        layer(torch.randn(16, 4, 3, 3))
    assert "forward" not in vars(layer)
    ended, other = metrics if first_ends_first else reversed(metrics)
    assert (ended.count.item(), other.count.item()) == (16 * 4 * 9, 2 * 16 * 4 * 9)


@pytest.mark.parametrize("watch_ends_first", [True, False])
def test_a_watch_below_another_addition_to_forward_ends_in_any_order(watch_ends_first: bool) -> None:
    layer = AmidArithmetic(4)
    watch = ActivationHooks(find_batch_norms(layer), NormalizedActivations(1))
    addition = EveryCall(layer, "forward", lambda forward, *args: forward(*args))
    ends = [watch.remove, addition.undo]
    for end in ends if watch_ends_first else reversed(ends):
        layer(torch.randn(16, 4, 3, 3))
        end()
    assert "forward" not in vars(layer)


class OwnStatistics(nn.BatchNorm1d):
    """Normalises with statistics that only its own forward knows."""

    def forward(self, input: Tensor) -> Tensor:
        return (input - 1) / 2 * self.weight + self.bias


class Rectified(OwnStatistics):
    """The same with an activation inside."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_of_a_subclasss_own_are_read_off_its_output(dtype: torch.dtype) -> None:
    layer = OwnStatistics(3).to(dtype)
    nn.init.uniform_(layer.weight, 0.05, 0.2)
    nn.init.normal_(layer.bias, std=0.1)
    inputs = torch.randn(2000, 3).to(dtype) * 3 + 2
    absmax, over_3 = seen(layer, lambda: layer(inputs))
    reference = ((inputs.double() - 1) / 2).abs()
    precision = 1e-5 if dtype != torch.bfloat16 else 2e-2
    assert absmax[0] == pytest.approx(reference.max().item(), rel=precision)
    assert over_3[0] == pytest.approx((reference > 3).double().mean().item(), abs=precision / 5)


def test_of_a_subclasss_own_statistics_channels_at_scale_0_cannot_be_read() -> None:
    layer = OwnStatistics(2)
    layer.weight.data[0] = 0.0
    inputs = torch.randn(100, 2) + 20
    absmax, _ = seen(layer, lambda: layer(inputs))
    both = [by_numpy(inputs.double().numpy())[0], (inputs.double().numpy()[:, 1] - 1) / 2]
    assert absmax[0] == pytest.approx(np.abs(both).max(), rel=1e-5)


def test_an_output_that_is_no_affine_function_of_the_input_tells_nothing() -> None:
    layer, plain = Rectified(2), nn.BatchNorm1d(2)
    inputs = torch.randn(100, 2)
    assert seen(layer, lambda: layer(inputs)) == seen(plain, lambda: plain(inputs))
