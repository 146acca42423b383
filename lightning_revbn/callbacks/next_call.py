"""Changes one call of a method of an object that is not ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["NextCall", "followed_by"]


class NextCall:
    """Has the next call of an object's method go through a function; the object is as before from then on.

    Copies and pickles of the object get the method without the addition.

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
        self.undo()
        return self._around(self.__wrapped__, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, str]]:
        return getattr, (self._owner, self._name)

    def undo(self) -> None:
        """Take the addition away, if it is still there."""
        if vars(self._owner).get(self._name) is not self:
            return
        if self._was_attribute:
            vars(self._owner)[self._name] = self.__wrapped__
        else:
            del vars(self._owner)[self._name]


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
