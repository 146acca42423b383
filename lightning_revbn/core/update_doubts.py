"""Undoes and refuses an optimizer's first update if the update has not read how each part of its groups learns."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_revbn.core.group_parts import GroupPlan
from lightning_revbn.core.update_watch import ReadWatch, local_values, refuse_unread

__all__ = ["UpdateDoubts"]


class UpdateDoubts:
    """The parts of groups that no update is known to have read, and how to undo an update that has not.

    Nobody can know before an update what the update will read. So all parameters are copied before the first
    update, and the copies are dropped after it.

    Args:
        optimizer: The optimizer.

    Attributes:
        watches: A watch for each part in doubt; empty after the first updates.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._plans: Sequence[GroupPlan] = []
        self.watches: list[ReadWatch] = []
        self._before: _BeforeUpdate | None = None

    def take(self, plans: Sequence[GroupPlan]) -> None:
        """Doubt the parts of these plans, and no others.

        Args:
            plans: The plans of the optimizer's groups.
        """
        self._plans = plans
        self.watches = [watch for plan in plans for watch in plan.doubts]

    def start(self) -> None:
        """Note the values of parameters, before the optimizer's code runs or runs on."""
        self._before = _BeforeUpdate(self._optimizer)
        for watch in self.watches:
            watch.start(self._optimizer.state)

    def listen(self) -> None:
        """Note from now on what the optimizer's code reads."""
        for watch in self.watches:
            watch.listen(self._optimizer.state)

    def pause(self) -> None:
        """Let other code than the optimizer's read and change what it likes."""
        for watch in self.watches:
            watch.pause()

    def settle(self) -> None:
        """Forget the doubts that an update has settled.

        Raises:
            RuntimeError: If the update has not read how parts learn; it is undone then.
        """
        self.pause()
        before, self._before = self._before, None
        has_own_lr = any(plan.has_own_lr for plan in self._plans)
        try:
            refuse_unread(type(self._optimizer).__name__, self.watches, has_own_lr=has_own_lr)
        except RuntimeError:
            if before is not None:
                before.restore()
            raise
        for plan in self._plans:
            plan.doubts = [watch for watch in plan.doubts if not watch.is_settled]
        self.take(self._plans)


class _BeforeUpdate:
    """An optimizer's parameters before an update, and which of them had state."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        learning = [parameter for parameter in held if parameter.requires_grad and not is_lazy(parameter)]
        self._values = [(parameter, local_values(parameter).clone()) for parameter in learning]
        self._with_state = {id(key) for key in optimizer.state}

    def restore(self) -> None:
        """Give the parameters their values back, and drop the state that the update has made."""
        for parameter, values in self._values:
            local_values(parameter).copy_(values)
        state = self._optimizer.state
        for key in [key for key in state if id(key) not in self._with_state]:
            del state[key]
