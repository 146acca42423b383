"""Tells whether a step has changed a parameter, for rules that no step may bypass."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_revbn.core.torch_compat import version_of

__all__ = ["ReadWatch", "UpdateWatch", "local_values", "refuse_unread"]


class UpdateWatch:
    """Watches a parameter over a step.

    The parameter's version counter is free to read, but torch's fused optimizers and writes through `.data` do not move
    it. So values are compared as well, as long as there is a doubt.

    Attributes:
        by_value: Whether to compare values: at first, and after a step that left a doubt.
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
        """Watch from the present values on: a change by a closure does not count as an update."""
        self.start(self._parameter)

    def has_changed(self) -> bool:
        """Tell whether the parameter has changed since the start."""
        parameter = self._parameter
        if parameter is None:
            return False
        return version_of(parameter) != self._version or (
            self._values is not None and not torch.equal(parameter, self._values)
        )


class ReadWatch:
    """Tells whether the first update of a part of a group has read the part's own learning rate and parameters.

    While the optimizer's code runs, two keys of the part's dict are strings that note each comparison with another
    string, as every look-up makes it. The dict stays a plain dict, and holds plain strings again after the first
    update.

    Args:
        shown: The dict that the optimizer finds.
        params: The parameters in it.
        has_own_lr: Whether the part has a learning rate of its own. If so, all its parameters are watched, since an
            update may skip some. Otherwise only the first is watched, since parameters may be large.

    Attributes:
        read: The keys among "lr" and "params" that were read.
        has_changed: Whether the optimizer has changed a watched parameter.
        had_state: Whether the optimizer had state for these parameters before. It may have read the rate long ago.
    """

    def __init__(self, shown: dict[str, Any], params: Sequence[Tensor], *, has_own_lr: bool) -> None:
        self.read: set[str] = set()
        self.has_changed = self.had_state = False
        self._shown = shown
        self._params = params
        self._has_own_lr = has_own_lr
        self._listens = False
        self._values: list[tuple[Tensor, Tensor]] = []

    @property
    def has_read_all(self) -> bool:
        """Whether the update has read both the learning rate and the parameters."""
        return len(self.read) == len(_READ)

    @property
    def is_settled(self) -> bool:
        """Whether the first update has come, which answers the question of this watch."""
        return self.has_changed or self.has_read_all

    def start(self, state: Container[Tensor]) -> None:
        """Note the values of parameters, before the optimizer's code runs.

        Args:
            state: The optimizer's state, by parameters.
        """
        held = [parameter for parameter in self._params if not is_lazy(parameter) and parameter.requires_grad]
        watched = held if self._has_own_lr else held[:1]
        self.had_state = self.had_state or any(parameter in state for parameter in watched)
        self._values = [(parameter, local_values(parameter).clone()) for parameter in watched]

    def listen(self, state: Container[Tensor]) -> None:
        """Note from now on which keys are read.

        Args:
            state: The optimizer's state, by parameters.
        """
        if not self._values:
            self.start(state)
        self._listens = True
        self._exchange_keys({key: _Heard(key, self.read) for key in _READ})

    def pause(self) -> None:
        """Stop listening, and check for changes, before code other than the optimizer's runs."""
        if self._listens:
            self._listens = False
            # Exchanging the keys compares them, which notes reads that are not the optimizer's.
            read = self.read.copy()
            self._exchange_keys({key: key for key in _READ})
            self.read.intersection_update(read)
        self.has_changed = self.has_changed or any(
            not torch.equal(local_values(parameter), values) for parameter, values in self._values
        )
        self._values = []

    def _exchange_keys(self, keys: dict[str, str]) -> None:
        # A dict keeps the key that it has for an equal key, so all items are put in anew, in their order.
        items = [(keys.get(key, key), value) for key, value in self._shown.items()]
        self._shown.clear()
        self._shown.update(items)


def refuse_unread(name: str, doubts: Sequence[ReadWatch], *, has_own_lr: bool) -> None:
    """Raise if an update has changed a part of a group without reading how the part learns.

    Args:
        name: The kind of the optimizer.
        doubts: The watches of the parts, after the update.
        has_own_lr: Whether a part has a learning rate of its own.

    Raises:
        RuntimeError: If so; the message names the remedy.
    """
    reads_rates = any("lr" in doubt.read for doubt in doubts)
    unread = [doubt for doubt in doubts if doubt.has_changed and not doubt.has_read_all]
    # An optimizer with earlier state, such as Rprop, may have read the rate long ago.
    unrated = [doubt for doubt in unread if has_own_lr and "lr" not in doubt.read and not doubt.had_state]
    if any(reads_rates or "params" in doubt.read for doubt in unrated):
        raise RuntimeError(
            f"{name}.step() takes one learning rate for all parameters, and does not read 'lr' in each of its "
            "param_groups, so scales or shifts cannot learn with a rate of their own. The update was undone. "
            "scale_param_groups does not help this optimizer: use another, or let its step() read 'lr' of every group"
        )
    if any("params" not in doubt.read for doubt in unread):
        raise RuntimeError(
            f"{name}.step() updates parameters that it has kept from before the step, and does not read "
            "'params' in its param_groups, so scales or shifts cannot learn in their own way. The update was undone: "
            "use scale_param_groups for this optimizer, or let its step() read 'params' of every group"
        )


def local_values(parameter: Tensor) -> Tensor:
    """Return the values of a parameter that this rank holds, so that no rank waits for another to compare them.

    Args:
        parameter: The parameter; it may be a DTensor.

    Returns:
        A view of its memory without gradient.
    """
    local = getattr(parameter, "to_local", None)
    found: Tensor = parameter.detach() if local is None else local().detach()
    return found


_READ = "lr", "params"
"""The keys that an update must read of each part."""


class _Heard(str):
    """A key that notes its look-ups."""

    _read: set[str]

    def __new__(cls, key: str, read: set[str]) -> _Heard:
        """Make a key that equals a plain key."""
        heard = super().__new__(cls, key)
        heard._read = read
        return heard

    def __eq__(self, other: object) -> bool:
        is_equal = super().__eq__(other)
        if is_equal is True:
            self._read.add(str(self))
        return is_equal

    __hash__ = str.__hash__

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Give copies and pickles of the group the plain key."""
        return str, (str(self),)
