"""Routes calls of a method through a function: the next call only, or every call until `undo`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["EveryCall", "NextCall", "followed_by"]


class EveryCall:
    """Routes every call of `owner.name` through `around`, until `undo` restores the method.

    A copy or pickle of the owner has its own method, without `around`.

    Args:
        owner: The object.
        name: The name of its method.
        around: Called with the method and the arguments of the call; returns the result of the call.
    """

    def __init__(self, owner: object, name: str, around: Callable[..., Any]) -> None:
        self._owner, self._name, self._around = owner, name, around
        self._was_attribute = name in vars(owner)
        self._is_undone = False
        self.__wrapped__: Callable[..., Any] = getattr(owner, name)  # where is_overridden looks for the method
        vars(owner)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `around`, or after `undo` the method."""
        if self._is_undone:  # another object on top may still call this one
            return self.__wrapped__(*args, **kwargs)
        return self._around(self.__wrapped__, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self._owner, self._name)

    @property
    def is_pending(self) -> bool:
        """Whether the next call goes through `around`."""
        return not self._is_undone

    def undo(self) -> None:
        """Restore the method. If another object of this class was put on top later, its `undo` restores the method."""
        self._is_undone = True
        attributes = vars(self._owner)
        while isinstance(top := attributes.get(self._name), EveryCall) and top._is_undone:
            if top._was_attribute:
                attributes[self._name] = top.__wrapped__
            else:
                del attributes[self._name]


class NextCall(EveryCall):
    """Routes the next call of `owner.name` through `around`, then restores the method.

    Args:
        owner: The object.
        name: The name of its method.
        around: Called with the method and the arguments of the call; returns the result of the call.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Restore the method, then call `around`."""
        if self._is_undone:
            return self.__wrapped__(*args, **kwargs)
        self.undo()  # before the call, since the call may raise, or call the method again
        return self._around(self.__wrapped__, *args, **kwargs)


def followed_by(then: Callable[[], None]) -> Callable[..., Any]:
    """Make an `around` that calls a function after the method.

    Args:
        then: The function; it takes no arguments.

    Returns:
        The `around` for `NextCall` or `EveryCall`.
    """

    def around(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        then()
        return result

    return around
