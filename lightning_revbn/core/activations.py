"""How large the normalised values get inside batch norm layers, as a torchmetrics metric."""

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
"""From which `|x_hat|` on a value counts as large; of normally distributed values 0.27 % are."""


class NormalizedExtremes(NamedTuple):
    """What `NormalizedActivations` computes; shape `(L + 1,)` each: L layers, and last all of them together."""

    absmax: Tensor
    """Greatest `|x_hat|`; NaN if one was NaN."""
    over_3: Tensor
    """Share of values with `|x_hat| > 3`, in [0, 1]; NaN for a layer that has seen nothing."""


class NormalizedActivations(Metric):
    """Greatest `|x_hat|` and share of `|x_hat| > 3` in batch norm layers, over all that was seen since the last reset.

    x_hat is what a batch norm layer multiplies with its scale: `(x - mean) / sqrt(var + eps)`. Reduced across ranks as
    torchmetrics does: the greatest by maximum, the share by sums.

    Args:
        layers: Number of layers L.
        **options: For `torchmetrics.Metric`.

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
        add_state("over", torch.zeros(layers, dtype=torch.int64), dist_reduce_fx="sum")
        add_state("count", torch.zeros(layers, dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, layer: int, normalized: Tensor) -> None:
        """Take in values of one layer.

        Args:
            layer: Which, counted from 0.
            normalized: x_hat, any shape.
        """
        if not normalized.numel():
            return
        size = normalized.detach().abs()
        self.absmax[layer] = torch.maximum(self.absmax[layer], size.amax().to(self.absmax))
        self.over[layer] += (size > _THRESHOLD).sum().to(self.over)
        self.count[layer] += size.numel()

    @override
    def compute(self) -> NormalizedExtremes:
        """Compute both over all ranks.

        Returns:
            Greatest `|x_hat|` and share of `|x_hat| > 3`, of each layer and of all.
        """
        over, count = (torch.cat([state, state.sum()[None]]).to(self.absmax.dtype) for state in (self.over, self.count))
        greatest = self.absmax.max()[None] if len(self.absmax) else self.absmax.new_zeros(1)
        return NormalizedExtremes(torch.cat([self.absmax, greatest]), over / count)


class ActivationHooks:
    """Forward hooks that give a metric the normalised values of batch norm layers, until they are removed.

    Of torch's own layers x_hat is computed from their input: with the statistics of the batch in training mode (of the
    batches of all ranks where the layer synchronises), else with the running statistics. So it does not depend on scale
    and shift, which may be 0 or missing. Where a layer has a `forward` of its own, its call of
    `torch.nn.functional.batch_norm` is watched, whatever it does before and after; x_hat is that of the call. Only a
    `forward` that makes no such call, and gives an affine function of the input, is judged by its output, in channels
    whose scale is not 0.

    A forward pass that gradient checkpointing runs again in the backward pass is not measured again.

    Nothing is kept but the metric's numbers. Not measured: layers in code compiled by `torch.compile`, in transforms of
    `torch.func`, and layers whose input is a DTensor.

    Use it as a context manager, or call `remove`.

    Args:
        records: The layers, in the order in which the metric counts them.
        metric: What to update.

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
        metric.update(0, torch.empty(0))  # torchmetrics warns of what was never updated, though no layer may run
        self._removals: list[Callable[[], None]] = []
        for index, record in enumerate(records):
            layer, measure = record.module, _Measure(metric, index)
            # Of torch's own forward the input tells everything, and a hook costs least.
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
    """Gives the values of one layer to the metric."""

    def __init__(self, metric: NormalizedActivations, index: int) -> None:
        self._metric = metric
        self._index = index

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Measure a layer that is known to work as torch's."""
        self.after(layer, args, kwargs, None)

    def after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        """Measure a layer by its input and output."""
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
        """Measure a call of batch norm by its arguments."""
        if _is_measurable(inputs):
            with torch.no_grad():
                self._metric.update(self._index, _x_hat(layer, inputs, running, training, eps))


class _WatchedForward(EveryCall):
    """Measures the calls of batch norm in a layer's forward until it is undone."""

    def __init__(self, layer: nn.Module, measure: _Measure) -> None:
        # A synchronised layer answers its call of batch norm itself: there the call is seen from inside alone.
        super().__init__(*innermost_forward(layer), self._watch)
        self._layer = layer
        self._measure = measure
        # Layers inside this one are measured by themselves.
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

    # What synchronises a layer copies its forward before itself, so the method cannot be looked up in the copy.

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self.__wrapped__, memo)

    @override
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return functools.partial, (self.__wrapped__,)


class _MeasuredCalls(BatchNormCalls):
    """Measures calls of batch norm, and lets them pass."""

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
    """Tell whether nothing but torch's code runs in a layer's forward, and what synchronises the layer around it."""
    owner, name = innermost_forward(layer)
    own = type(layer).forward in (BatchNormBase.forward, nn.SyncBatchNorm.forward)
    return own and (owner is not layer or name not in vars(layer))


def _is_measurable(inputs: object) -> TypeGuard[Tensor]:
    """Tell whether values can be read: not in compiled code, nor a second time while gradients are computed."""
    if torch.compiler.is_compiling() or is_in_backward():
        return False
    # What is no batch of channels, the layer itself refuses.
    return isinstance(inputs, Tensor) and inputs.dim() >= 2 and not _stands_for_others(inputs)


def compute_x_hat(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Compute x_hat of a batch norm layer, as it would be in the next forward pass; change nothing.

    Args:
        layer: A batch norm layer, frozen ones included.
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
    # torch's kernels compute in float32 too where values have half precision.
    values = values if values.dtype == torch.float64 else values.float()
    if training or running[0] is None or running[1] is None:
        mean, variance = _batch_moments(layer, values)
    else:
        mean, variance = (statistic.detach().to(values) for statistic in (running[0], running[1]))
    shape = [1, -1] + [1] * (values.dim() - 2)
    return (values - mean.reshape(shape)).mul_((variance + eps).rsqrt().reshape(shape))


def _batch_moments(layer: nn.Module, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance per channel: of this rank's batch, or of all ranks' where the layer synchronises."""
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
    # Variances of ranks add up only together with how far the ranks' means lie apart.
    shares = counts / counts.sum(0)
    mean = (means * shares).sum(0)
    variance = ((variances + (means - mean).square()) * shares).sum(0)
    return mean.to(values), variance.to(values)


def _corrected_by_output(layer: nn.Module, x_hat: Tensor, output: Tensor) -> Tensor:
    """Return the x_hat that an output reveals, where the layer has normalised by other statistics than expected.

    A layer computes `output = x_hat * scale + shift`, so `revealed = (output - shift) / scale` is the x_hat that it
    used. With other statistics that is `a * x_hat + b`, with an `a` and a `b` for each channel. Where the output
    reveals anything else, an activation or dropout follows inside the layer, and the x_hat of the input stands.
    """
    shape = [1, -1] + [1] * (x_hat.dim() - 2)
    affine = cast("list[Tensor | None]", [getattr(layer, name, None) for name in ("weight", "bias")])
    scale = x_hat.new_ones(1) if affine[0] is None else affine[0].to(x_hat)
    shift = x_hat.new_zeros(1) if affine[1] is None else affine[1].to(x_hat)
    scale, shift = scale.reshape(shape), shift.reshape(shape)
    observed = output.to(x_hat)
    # A few roundings in the precision of the output, which may be half of that of x_hat.
    tolerance = 30 * torch.finfo(output.dtype).eps
    if _is_near(observed, x_hat * scale + shift, tolerance):
        return x_hat
    # A channel with scale 0 gives its shift for every input: its output reveals nothing.
    revealed = torch.where(scale == 0, x_hat, (observed - shift) / scale)
    others = [dim for dim in range(x_hat.dim()) if dim != 1]
    # The straight line through the points (x_hat, revealed) of a channel, by least squares. A channel without spread
    # has no slope to fit; any slope describes its one point.
    centred, mean = x_hat - x_hat.mean(others, keepdim=True), revealed.mean(others, keepdim=True)
    spread = centred.square().sum(others, keepdim=True)
    slope = torch.where(spread == 0, 0.0, (centred * revealed).sum(others, keepdim=True) / spread)
    # The shift was subtracted, which magnifies the roundings of the output: hence the wider tolerance.
    return revealed if _is_near(revealed, centred * slope + mean, 10 * tolerance) else x_hat


def _is_near(values: Tensor, others: Tensor, tolerance: float) -> bool:
    """Tell whether tensors are equal up to rounding, in proportion to the greatest value of the first."""
    return bool((values - others).abs().amax() <= tolerance * values.abs().amax())


def _stands_for_others(tensor: Tensor) -> bool:
    """Tell whether a tensor stands for other values than it holds: in a transform of torch.func, or as a DTensor."""
    return hasattr(tensor, "full_tensor") or is_functorch_wrapped(tensor)
