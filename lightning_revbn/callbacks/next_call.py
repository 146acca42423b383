"""Routes calls of a method through a function: the next call alone, or every call until it is undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["EveryCall", "NextCall", "followed_by"]


class EveryCall:
    """Routes every call of `owner.name` through `around`, until `undo` restores the method.

    Copies and pickles of the owner get the method without the addition.

    Args:
        owner: The object.
        name: Of its method.
        around: Takes the method and the arguments of the call, and returns the result of the call.
    """

    def __init__(self, owner: object, name: str, around: Callable[..., Any]) -> None:
        self._owner, self._name, self._around = owner, name, around
        self._was_attribute = name in vars(owner)
        self.__wrapped__: Callable[..., Any] = getattr(owner, name)  # where is_overridden looks for the method
        vars(owner)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call."""
        return self._around(self.__wrapped__, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, str]]:
        return getattr, (self._owner, self._name)

    @property
    def is_pending(self) -> bool:
        """Whether the addition is still there."""
        return vars(self._owner).get(self._name) is self

    def undo(self) -> None:
        """Restore the method, if the addition is still there."""
        if not self.is_pending:
            return
        if self._was_attribute:
            vars(self._owner)[self._name] = self.__wrapped__
        else:
            del vars(self._owner)[self._name]


class NextCall(EveryCall):
    """Routes the next call of `owner.name` through `around`, then restores the method.

    Args:
        owner: The object.
        name: Of its method.
        around: Takes the method and the arguments of the call, and returns the result of the call.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call."""
        self.undo()
        return super().__call__(*args, **kwargs)


def followed_by(then: Callable[[], None]) -> Callable[..., Any]:
    """Return what makes `NextCall` call a function after the method.

    Args:
        then: The function.

    Returns:
        The argument `around` of `NextCall`.
    """

    def around(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        then()
        return result

    return around
