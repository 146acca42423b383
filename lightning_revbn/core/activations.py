"""Measures the size of normalised values inside batch norm layers, as a torchmetrics metric."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Container, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_revbn.core.batch_norm_calls import BatchNormCall, BatchNormCalls
from lightning_revbn.core.batch_norm_sync import innermost_forward, shared_batch
from lightning_revbn.core.layers import BatchNormRecord
from lightning_revbn.core.next_call import EveryCall
from lightning_revbn.core.torch_compat import BatchNormBase, is_functorch_wrapped, is_in_backward

__all__ = ["ActivationHooks", "NormalizedActivations", "NormalizedExtremes", "compute_x_hat"]

_THRESHOLD = 3.0
"""A value counts as large above this `|x_hat|`; 0.27 % of normally distributed values do."""


class NormalizedExtremes(NamedTuple):
    """Result of `NormalizedActivations`; shape `(L + 1,)` each: L layers, and last all layers together."""

    absmax: Tensor
    """Greatest `|x_hat|`; NaN if any x_hat was NaN, 0 for a layer without values."""
    over_3: Tensor
    """Share of values with `|x_hat| > 3`, in [0, 1]; NaN for a layer without values."""


class NormalizedActivations(Metric):
    """Greatest `|x_hat|` and share of `|x_hat| > 3` in batch norm layers, over all values since the last reset.

    A batch norm layer multiplies x_hat, `(x - mean) / sqrt(var + eps)`, by its scale. torchmetrics reduces the metric
    over ranks: the greatest by a maximum, the share by sums of counts.

    Args:
        layers: Number of layers L.
        **options: Keyword arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = NormalizedActivations(layers=1)
        >>> metric.update(0, torch.tensor([0.5, -4.0, 1.0, 2.0]))
        >>> metric.compute().absmax[0].item(), metric.compute().over_3[0].item()
        (4.0, 0.25)
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    absmax: Tensor
    over: Tensor
    count: Tensor

    def __init__(self, layers: int, **options: Any) -> None:
        super().__init__(**options)
        add_state = cast("Callable[..., None]", self.add_state)  # pyright: ignore[reportUnknownMemberType] # partly untyped
        add_state("absmax", torch.zeros(layers), dist_reduce_fx="max")
        # Counts are int64, since float32 counts exactly only up to 2^24.
        add_state("over", torch.zeros(layers, dtype=torch.int64), dist_reduce_fx="sum")
        add_state("count", torch.zeros(layers, dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, layer: int, normalized: Tensor) -> None:
        """Add values of a layer.

        Args:
            layer: The index of the layer, from 0.
            normalized: x_hat of the layer, in any shape.
        """
        if not normalized.numel():
            return
        size = normalized.detach().abs()
        self.absmax[layer] = torch.maximum(self.absmax[layer], size.amax().to(self.absmax))
        self.over[layer] += (size > _THRESHOLD).sum().to(self.over)
        self.count[layer] += size.numel()

    @override
    def compute(self) -> NormalizedExtremes:
        """Compute the metric, over all ranks.

        Returns:
            Greatest `|x_hat|` and share of `|x_hat| > 3`, of each layer and of all layers.
        """
        over, count = (torch.cat([state, state.sum()[None]]).to(self.absmax.dtype) for state in (self.over, self.count))
        greatest = self.absmax.max()[None] if len(self.absmax) else self.absmax.new_zeros(1)
        return NormalizedExtremes(torch.cat([self.absmax, greatest]), over / count)


class ActivationHooks:
    """Forward hooks that update a metric with the normalised values of batch norm layers, until `remove`.

    x_hat of a layer is computed in three ways:

    - For torch's own layers from the input of the layer: with the statistics of the batch in training mode (of the
      batches of all ranks if the layer synchronises), else with the running statistics. So x_hat does not depend on
      scale and shift, which may be 0 or missing.
    - For a layer with its own `forward` from the arguments of its call of `torch.nn.functional.batch_norm`, whatever
      the `forward` does before and after the call.
    - If such a `forward` makes no call, from the input; and from the output, if that is another affine function of the
      input, in channels whose scale is not 0.

    A forward pass that gradient checkpointing runs again in the backward pass is not measured again.

    The hooks keep no activations, only the metric's numbers. They do not measure layers in code compiled by
    `torch.compile`, in transforms of `torch.func`, or layers whose input is a DTensor.

    Use it as a context manager, or call `remove`.

    Args:
        records: The layers, in the order in which the metric counts them.
        metric: The metric to update.

    Example:
        >>> from lightning_revbn import find_batch_norms
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> records = find_batch_norms(model)
        >>> metric = NormalizedActivations(len(records))
        >>> with ActivationHooks(records, metric):
        ...     _ = model(torch.randn(32, 4))
        >>> metric.count.tolist()
        [256]
    """

    def __init__(self, records: Sequence[BatchNormRecord], metric: NormalizedActivations) -> None:
        metric.update(0, torch.empty(0))  # torchmetrics warns of a metric without updates, even if no layer may run
        self._removals: list[Callable[[], None]] = []
        for index, record in enumerate(records):
            layer, measure = record.module, _Measure(metric, index)
            # For torch's own forward the input is enough, and a hook costs less than watching its call.
            if _has_torchs_forward(layer):
                removal = layer.register_forward_pre_hook(measure.before, with_kwargs=True).remove
            else:
                removal = _WatchedForward(layer, measure).undo
            self._removals.append(removal)

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        while self._removals:
            self._removals.pop()()

    def __enter__(self) -> ActivationHooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class _Measure:
    """Updates the metric with the values of a layer."""

    def __init__(self, metric: NormalizedActivations, index: int) -> None:
        self._metric = metric
        self._index = index

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Measure a layer with torch's forward by its input."""
        self.after(layer, args, kwargs, None)

    def after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        """Measure a layer by its input, and by its output where that shows another x_hat."""
        inputs: object = args[0] if args else next(iter(kwargs.values()), None)
        if not _is_measurable(inputs):
            return
        with torch.no_grad():
            x_hat = compute_x_hat(layer, inputs)
            if isinstance(output, Tensor) and output.shape == inputs.shape and output.numel():
                x_hat = _corrected_by_output(layer, x_hat, output)
            self._metric.update(self._index, x_hat)

    def call(
        self,
        layer: nn.Module,
        inputs: Tensor,
        running: tuple[Tensor | None, Tensor | None],
        training: bool,
        eps: float,
    ) -> None:
        """Measure a call of `batch_norm` by its arguments."""
        if _is_measurable(inputs):
            with torch.no_grad():
                self._metric.update(self._index, _x_hat(layer, inputs, running, training, eps))


class _WatchedForward(EveryCall):
    """Measures the calls of `batch_norm` in a layer's forward, until `undo`."""

    def __init__(self, layer: nn.Module, measure: _Measure) -> None:
        # `synchronize_batch_norms` wraps a forward and answers its call of batch_norm. So the forward inside the
        # wrapper is watched: outside of it no call is seen.
        super().__init__(*innermost_forward(layer), self._watch)
        self._layer = layer
        self._measure = measure
        # A layer inside this layer has its own hook, so its calls are not measured here.
        inner = [module for module in layer.modules() if module is not layer and isinstance(module, BatchNormBase)]
        self._foreign = {id(tensor) for module in inner for tensor in (module.running_mean, module.weight)} - {id(None)}

    def _watch(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with _MeasuredCalls(self._layer, self._measure, self._foreign) as calls:
            output = forward(*args, **kwargs)
        if not calls.were_seen:
            self._measure.after(self._layer, args, kwargs, output)
        return output

    # The wrapper of a synchronised layer copies this forward before the layer has a copy, so the copy must not look up
    # the method in the layer.

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self.__wrapped__, memo)

    @override
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return functools.partial, (self.__wrapped__,)


class _MeasuredCalls(BatchNormCalls):
    """Measures calls of `batch_norm`, and passes them on."""

    def __init__(self, layer: nn.Module, measure: _Measure, foreign: Container[int]) -> None:
        super().__init__()
        self.were_seen = False
        self._layer, self._measure, self._foreign = layer, measure, foreign

    @override
    def answer(self, call: BatchNormCall) -> Tensor:
        if id(call.running_mean) not in self._foreign and id(call.weight) not in self._foreign:
            self.were_seen = True
            running = call.running_mean, call.running_var
            self._measure.call(self._layer, call.input, running, call.training, call.eps)
        return call.make()


def _has_torchs_forward(layer: nn.Module) -> bool:
    """Tell whether a layer's forward is torch's own, apart from a wrapper of `synchronize_batch_norms` around it."""
    owner, name = innermost_forward(layer)
    own = type(layer).forward in (BatchNormBase.forward, nn.SyncBatchNorm.forward)
    return own and (owner is not layer or name not in vars(layer))


def _is_measurable(inputs: object) -> TypeGuard[Tensor]:
    """Tell whether to measure values: not in compiled code, and not when a backward pass repeats a forward pass."""
    if torch.compiler.is_compiling() or is_in_backward():
        return False
    # Input without a dimension of channels is left to the layer, which raises its own error.
    return isinstance(inputs, Tensor) and inputs.dim() >= 2 and not _stands_for_others(inputs)


def compute_x_hat(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Compute the x_hat of a batch norm layer in its next forward pass, without changing the layer.

    Args:
        layer: A batch norm layer; it may be frozen.
        inputs: Its input, shape `(N, C)` or `(N, C, *)`.

    Returns:
        `(inputs - mean) / sqrt(var + eps)`, of the same shape, in float32 or better.
    """
    running = cast("list[Tensor | None]", [getattr(layer, name, None) for name in ("running_mean", "running_var")])
    training = isinstance(layer, BatchNormBase) and layer.training
    return _x_hat(layer, inputs, (running[0], running[1]), training, getattr(layer, "eps", 1e-5))


def _x_hat(
    layer: nn.Module, inputs: Tensor, running: tuple[Tensor | None, Tensor | None], training: bool, eps: float
) -> Tensor:
    values = inputs.detach()
    # torch's kernels also compute in float32 where values have half precision.
    values = values if values.dtype == torch.float64 else values.float()
    if training or running[0] is None or running[1] is None:
        mean, variance = _batch_moments(layer, values)
    else:
        mean, variance = (statistic.detach().to(values) for statistic in (running[0], running[1]))
    shape = [1, -1] + [1] * (values.dim() - 2)
    return (values - mean.reshape(shape)).mul_((variance + eps).rsqrt().reshape(shape))


def _batch_moments(layer: nn.Module, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance per channel, of this rank's batch, or of all ranks' if the layer synchronises."""
    others = [dim for dim in range(values.dim()) if dim != 1]
    channels = values.shape[1]
    if values.numel():  # a rank without samples still takes part in the collective below
        variance, mean = torch.var_mean(values, others, correction=0)
    else:
        mean = variance = values.new_zeros(channels)
    ranks, group = shared_batch(layer)
    if ranks == 1 or not layer.training:
        return mean, variance
    count = values.new_full((channels,), values.numel() // max(1, channels))
    own = torch.stack([count, mean, variance]).double()
    gathered = [torch.empty_like(own) for _ in range(ranks)]
    torch.distributed.all_gather(gathered, own, group=group)  # pyright: ignore[reportUnknownMemberType] # torch does not type it
    counts, means, variances = torch.stack(gathered).unbind(1)
    # The variance over all ranks is the mean of their variances plus the variance of their means.
    shares = counts / counts.sum(0)
    mean = (means * shares).sum(0)
    variance = ((variances + (means - mean).square()) * shares).sum(0)
    return mean.to(values), variance.to(values)


def _corrected_by_output(layer: nn.Module, x_hat: Tensor, output: Tensor) -> Tensor:
    """Return the x_hat that the output shows, if the layer has normalised by other statistics than expected.

    A layer computes `output = x_hat * scale + shift`, so it has used `revealed = (output - shift) / scale`. With other
    statistics than expected, `revealed` is `a * x_hat + b`, with an `a` and a `b` per channel. If it is anything else,
    an activation or dropout follows inside the layer, and the x_hat of the input is returned.
    """
    shape = [1, -1] + [1] * (x_hat.dim() - 2)
    affine = cast("list[Tensor | None]", [getattr(layer, name, None) for name in ("weight", "bias")])
    scale = x_hat.new_ones(1) if affine[0] is None else affine[0].to(x_hat)
    shift = x_hat.new_zeros(1) if affine[1] is None else affine[1].to(x_hat)
    scale, shift = scale.reshape(shape), shift.reshape(shape)
    observed = output.to(x_hat)
    # A few roundings in the precision of the output, which may be lower than the precision of x_hat.
    tolerance = 30 * torch.finfo(output.dtype).eps
    if _is_near(observed, x_hat * scale + shift, tolerance):
        return x_hat
    # The output of a channel with scale 0 is its shift for every input, and shows nothing of x_hat.
    revealed = torch.where(scale == 0, x_hat, (observed - shift) / scale)
    others = [dim for dim in range(x_hat.dim()) if dim != 1]
    # Fit a straight line to the points (x_hat, revealed) of each channel, by least squares. All points of a channel
    # without spread have the same x_hat, so any slope fits; 0 avoids a division by 0.
    centred, mean = x_hat - x_hat.mean(others, keepdim=True), revealed.mean(others, keepdim=True)
    spread = centred.square().sum(others, keepdim=True)
    slope = torch.where(spread == 0, 0.0, (centred * revealed).sum(others, keepdim=True) / spread)
    # Subtracting the shift magnifies the roundings of the output: hence the wider tolerance.
    return revealed if _is_near(revealed, centred * slope + mean, 10 * tolerance) else x_hat


def _is_near(values: Tensor, others: Tensor, tolerance: float) -> bool:
    """Tell whether tensors differ by no more than a tolerance, relative to the greatest value of the first."""
    return bool((values - others).abs().amax() <= tolerance * values.abs().amax())


def _stands_for_others(tensor: Tensor) -> bool:
    """Tell whether a tensor is in a transform of torch.func, or a DTensor: its own storage is not all of its values."""
    return hasattr(tensor, "full_tensor") or is_functorch_wrapped(tensor)
