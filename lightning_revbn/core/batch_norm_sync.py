"""Lets batch norm layers normalise by the batch of all ranks, and keeps the classes of the layers.

torch's converter puts a `SyncBatchNorm` in place of every layer, and so drops the additions of a subclass: an
activation, dropout, auxiliary layers, hooks. Here no layer is replaced. While a layer trains on several ranks, only its
call of `torch.nn.functional.batch_norm` gets another answer, on CPUs too.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import override

from lightning_revbn.core.arguments import check_patterns, check_patterns_match, matching_names
from lightning_revbn.core.batch_norm_calls import BatchNormCall, BatchNormCalls
from lightning_revbn.core.global_batch_norm import global_batch_norm, ranks_in, refuse_single_values, update_running
from lightning_revbn.core.global_moments import global_moments
from lightning_revbn.core.moments import Kind
from lightning_revbn.core.torch_compat import BatchNormBase, has_hooks

__all__ = [
    "damaged_by_conversion",
    "innermost_forward",
    "restore_batch_norms",
    "shared_batch",
    "synchronize_batch_norms",
]

_Model = TypeVar("_Model", bound=nn.Module)

_HARMLESS = {"__init__", "__repr__", "_check_input_dim", "extra_repr", "reset_parameters"}
"""The methods that a subclass may define without losing anything in the conversion."""


def synchronize_batch_norms(model: _Model, process_group: Any = None, exclude: Sequence[str] = ()) -> _Model:
    """Let batch norm layers normalise by the batch of all ranks while they train, without replacing a layer.

    Classes, parameters, hooks, training flags and the keys of `state_dict` stay. In training mode on two or more ranks,
    every call of `torch.nn.functional.batch_norm` in the layer's forward pass uses the mean and variance of all ranks.
    They also update the running statistics. This takes a collective forwards, and another
    backwards if the input needs a gradient. Ranks may have different numbers of samples, or none. In all other cases
    the layer works as before. Layers that synchronise by themselves (`SyncBatchNorm`, `InputBatchNorm`), or that are
    synchronised already, are left alone. A deep copy is synchronised too; a pickle holds the layer as it was before.

    Args:
        model: A model on every rank, changed in place.
        process_group: The ranks that share a batch; None is the default group.
        exclude: `fnmatch` patterns on dotted names of layers to leave alone.

    Returns:
        The same model.

    Raises:
        ValueError: If a pattern matches no layer.

    Example:
        >>> model = synchronize_batch_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> type(model[1]).__name__, list(restore_batch_norms(model).state_dict())[2:4]
        ('BatchNorm2d', ['1.weight', '1.bias'])
    """
    layers = dict(_batch_norms(model))
    exclude = check_patterns("exclude", exclude)
    check_patterns_match("exclude", exclude, list(layers))
    excluded = matching_names(exclude, layers)
    for name, layer in layers.items():
        synchronizes_itself = isinstance(layer, nn.SyncBatchNorm) or _Synchronized.of(layer) is not None
        if not synchronizes_itself and name not in excluded:
            vars(layer)["forward"] = _Synchronized(name, layer, layer.forward, process_group)
    return model


def restore_batch_norms(model: _Model) -> _Model:
    """Undo `synchronize_batch_norms`.

    Args:
        model: The model, changed in place.

    Returns:
        The same model.
    """
    for _, layer in _batch_norms(model):
        synchronized = _Synchronized.of(layer)
        if synchronized is not None:
            synchronized.remove()
    return model


def shared_batch(layer: nn.Module) -> tuple[int, Any]:
    """Tell how many ranks share a layer's batch while it trains, and in which process group.

    Args:
        layer: A batch norm layer.

    Returns:
        The number, 1 for a layer that is not synchronised, and the group.
    """
    synchronized = _Synchronized.of(layer)
    if synchronized is None and not isinstance(layer, nn.SyncBatchNorm):
        return 1, None
    group: Any = layer.process_group if synchronized is None else synchronized.group
    return ranks_in(group), group


def innermost_forward(layer: nn.Module) -> tuple[object, str]:
    """Find the attribute through which the forward of a layer's own class is called.

    Args:
        layer: A batch norm layer.

    Returns:
        The object and the name of its attribute: the layer and `forward`, or the wrapper that synchronises the layer
        and `__wrapped__`.
    """
    synchronized = _Synchronized.of(layer)
    return (layer, "forward") if synchronized is None else (synchronized, "__wrapped__")


def damaged_by_conversion(model: nn.Module) -> dict[str, str]:
    """Find the layers that would lose something if `SyncBatchNorm.convert_sync_batchnorm` replaced them.

    Args:
        model: The model.

    Returns:
        The losses in words, by the layer's dotted name.

    Example:
        >>> class WithReLU(nn.BatchNorm2d):
        ...     def forward(self, input):
        ...         return super().forward(input).relu()
        >>> damaged_by_conversion(nn.Sequential(nn.BatchNorm2d(8), WithReLU(8)))
        {'1': 'forward of WithReLU'}
    """
    found = {name: ", ".join(_losses(layer)) for name, layer in _batch_norms(model)}
    return {name: losses for name, losses in found.items() if losses}


def _losses(layer: nn.Module) -> list[str]:
    """List the losses by the converter: methods, parametrisations, children, hooks."""
    if isinstance(layer, nn.SyncBatchNorm):  # converted before, or a choice of the user
        return []
    losses: list[str] = []
    for cls in type(layer).__mro__:
        if cls.__module__ == batchnorm.__name__:
            break
        methods = [
            name for name, value in vars(cls).items() if inspect.isfunction(value) or isinstance(value, property)
        ]
        own = [name for name in methods if name not in _HARMLESS]
        if own and not is_parametrized(layer):
            losses.append(f"{' and '.join(own)} of {cls.__name__}")
    if "forward" in vars(layer) and _Synchronized.of(layer) is None:
        losses.append("a forward of its own")
    if is_parametrized(layer):
        losses.append("its parametrisation")
    else:
        losses += [f"its child {name!r}" for name, _ in layer.named_children()]
    if has_hooks(layer) and not isinstance(layer, LazyModuleMixin):  # hooks make a lazy layer
        losses.append("its hooks")
    return losses


def _batch_norms(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    return [(name, layer) for name, layer in modules if isinstance(layer, BatchNormBase)]


class _Synchronized:
    """Stands as the attribute `forward` of a layer, and calls its forward pass with synchronised statistics."""

    def __init__(self, name: str, layer: nn.Module, forward: Callable[..., Any], group: Any) -> None:
        self.group = group
        self.__wrapped__ = forward
        self._name = name
        self._layer = layer
        self._had_own = "forward" in vars(layer)
        # torch.compile cannot compile collectives and the mode. It goes on before and after the layer.
        self._run = cast("Callable[..., Any]", torch.compiler.disable(self._run_synchronized))  # pyright: ignore[reportUnknownMemberType] # torch does not type it

    @classmethod
    def of(cls, layer: nn.Module) -> _Synchronized | None:
        """Return the wrapper that synchronises a layer; None if the layer is not synchronised."""
        forward = vars(layer).get("forward")
        return forward if isinstance(forward, cls) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._layer.training or ranks_in(self.group) == 1:
            return self.__wrapped__(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run_synchronized(self, *args: Any, **kwargs: Any) -> Any:
        # The layer's own forward runs, with all that a subclass adds to it; the mode catches the call inside.
        with _GlobalStatisticsMode(self.group) as mode:
            output = self.__wrapped__(*args, **kwargs)
        if not mode.was_used:
            raise RuntimeError(
                f"batch norm layer {self._name!r} cannot be synchronised: the forward of {type(self._layer).__name__} "
                f"does not call torch.nn.functional.batch_norm. If it synchronises by itself, or need not, exclude it: "
                f"exclude=[{self._name!r}]"
            )
        return output

    def remove(self) -> None:
        if self._had_own:
            vars(self._layer)["forward"] = self.__wrapped__
        else:
            del vars(self._layer)["forward"]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Synchronized:
        layer, forward = copy.deepcopy((self._layer, self.__wrapped__), memo)
        duplicate = type(self)(self._name, layer, forward, self.group)  # a process group cannot be copied
        duplicate._had_own = self._had_own
        return duplicate

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Callable[..., Any]]]:
        # A process group cannot be pickled. A partial of the forward alone loads without this package.
        return functools.partial, (self.__wrapped__,)


class _GlobalStatisticsMode(BatchNormCalls):
    """Answers calls of batch norm in training with the statistics of the batch of all ranks."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.was_used = False
        self._group = group

    @override
    def answer(self, call: BatchNormCall) -> Tensor:
        self.was_used = True
        if not call.training:
            return call.make()
        # Ranks need not agree on the kind of numbers, since batch norm takes floating-point values alone.
        values, ranks = call.input.detach(), ranks_in(self._group)
        batch = global_moments(values, kind=Kind.FLOAT, group=self._group, ranks=ranks)
        refuse_single_values(call.input, batch.moments)
        if call.running_mean is not None and call.running_var is not None:
            update_running(call.running_mean, call.running_var, batch.moments, call.momentum)
        return global_batch_norm(call.input, batch.moments, call.weight, call.bias, call.eps, self._group)
