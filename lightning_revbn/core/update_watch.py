"""Tells whether a step has changed a parameter, for a rule that no step may pass by."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_revbn.core.torch_compat import version_of

__all__ = ["UpdateWatch"]


class UpdateWatch:
    """Watches one parameter over a step.

    The parameter's version counter is free to read, but neither torch's fused optimizers nor those that write through
    `.data` move it. So the values are compared as well, as long as there is a doubt.

    Attributes:
        by_value: Whether to compare values. At first, and whenever a step has left a doubt.
    """

    def __init__(self) -> None:
        self.by_value = True
        self._parameter: Tensor | None = None
        self._version: int | None = None
        self._values: Tensor | None = None

    def start(self, parameter: Tensor | None, *, since_before: bool = False) -> None:
        """Begin to watch.

        Args:
            parameter: The parameter; None watches nothing.
            since_before: Whether to go on watching from the last start, if that was with this parameter.
        """
        if since_before and self._values is not None and parameter is self._parameter:
            return
        self._parameter = parameter
        if parameter is not None:
            self._version = version_of(parameter)
            self._values = parameter.detach().clone() if self.by_value else None

    def start_again(self) -> None:
        """Take what the parameter is now for what it was: a closure may have changed it, which is no update."""
        self.start(self._parameter)

    def has_changed(self) -> bool:
        """Tell whether the parameter is another than at the start."""
        parameter = self._parameter
        if parameter is None:
            return False
        return version_of(parameter) != self._version or (
            self._values is not None and not torch.equal(parameter, self._values)
        )
