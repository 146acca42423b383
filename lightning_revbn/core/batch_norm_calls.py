"""Intercepts every call of batch norm in a block of code, by either of torch's two ways to call it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

__all__ = ["BatchNormCall", "BatchNormCalls"]


class BatchNormCall(NamedTuple):
    """A call of batch norm, with the arguments and defaults of torch's function.

    Attributes:
        make: Makes the call.
        input: The input, shape `(N, C)` or `(N, C, *)`.
        running_mean: The running mean.
        running_var: The running variance.
        weight: The scale.
        bias: The shift.
        training: Whether to normalise by the batch.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
    """

    make: Callable[[], Tensor]
    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


class BatchNormCalls(TorchFunctionMode):
    """Passes calls of batch norm to `answer` while the mode is entered; a subclass defines `answer`."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType] # torch does not type it

    def answer(self, call: BatchNormCall) -> Tensor:
        """Return the result of a call.

        Args:
            call: The call.

        Returns:
            The result for the caller.
        """
        raise NotImplementedError

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = functools.partial(func, *args, **kwargs)
        # Some layers call torch's operator rather than the function, with the same arguments in another order.
        if func is torch.batch_norm:
            return self._answer_operator(call, *args, **kwargs)
        if func is nn.functional.batch_norm:
            return self.answer(BatchNormCall(call, *args, **kwargs))
        return call()

    def _answer_operator(
        self,
        call: Callable[[], Tensor],
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        return self.answer(BatchNormCall(call, input, running_mean, running_var, weight, bias, training, momentum, eps))
