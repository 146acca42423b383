"""Makes a view of an optimizer for its step to run on: the view differs in its `param_groups` alone."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from types import MemberDescriptorType
from typing import Any, ClassVar, cast

from torch.optim import Optimizer

from lightning_revbn.core.group_lists import lists_by_group
from lightning_revbn.core.param_groups import Group
from lightning_revbn.core.torch_compat import STEP_HOOKS

__all__ = ["OptimizerView"]


class OptimizerView:
    """An optimizer, seen with other parameter groups.

    The class of the view derives from the optimizer's class. View and optimizer share their `__dict__` and all
    `__slots__`, count as equal, and give the same `__class__`. Saving, loading or copying the view acts on the
    optimizer. The view lives as long as this object, so identities, weak references and caches hold from step to step.
    Only `type(view)` differs, so `type(self) is SGD` and `super(type(self), self)` fail in a step.

    Args:
        optimizer: The optimizer.
        read_groups: Returns the view's `param_groups`.
        hand_back: Updates the optimizer's own groups from the view's groups. It is called before code other than the
            optimizer's may use them; after it, `read_groups` must show what that code wrote.
        is_own_hook: Tells whether a step hook runs once per step, even if the optimizer's step calls its base's step.

    Attributes:
        optimizer: The optimizer.
        view: The view.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        read_groups: Callable[[], list[Group]],
        hand_back: Callable[[], None],
        is_own_hook: Callable[[Callable[..., Any]], bool],
    ) -> None:
        self.optimizer = optimizer
        self.read_groups = read_groups
        self.hand_back = hand_back
        self._is_own_hook = is_own_hook
        self.was_stored = False
        self._attributes: dict[str, Any] = {}
        # Without `__init__`, since the view takes its attributes from the optimizer.
        self.view: Optimizer = object.__new__(self._derived_class(type(optimizer)))

    def enter(self) -> Optimizer:
        """Return the view, ready for a step."""
        if self._attributes is not self.optimizer.__dict__:
            self._attributes = self.optimizer.__dict__
            # Through `object`, since the optimizer's class may have a `__setattr__` of its own.
            object.__setattr__(self.view, "__dict__", self._attributes)
        return self.view

    def leave(self) -> None:
        """Put the optimizer into the attributes in which its step has stored the view."""
        self.was_stored = False
        attributes = vars(self.optimizer)
        attributes.update({name: self.optimizer for name, value in attributes.items() if value is self.view})

    def hooks(self, name: str) -> dict[int, Callable[..., Any]]:
        """List step hooks for the step of a base class, which runs them on the view; each gets the optimizer instead.

        Args:
            name: The attribute that holds the hooks.

        Returns:
            The hooks, except for hooks that run once a step.
        """
        hooks: dict[int, Callable[..., Any]] = getattr(self.optimizer, name)
        found = {key: self._on_optimizer(hook) for key, hook in hooks.items() if not self._is_own_hook(hook)}
        if found:
            self.hand_back()
        return found

    def _on_optimizer(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(view: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result: Any = hook(self.optimizer, _exchanged(args, view, self.optimizer), kwargs)
            if not isinstance(result, tuple):
                return result
            arguments, *others = cast("tuple[Any, ...]", result)
            return (_exchanged(arguments, self.optimizer, view), *others)

        return run

    def _derived_class(self, cls: type[Optimizer]) -> type[Optimizer]:
        """Make the view's class without calling metaclasses, which may keep a register of classes."""
        namespace: dict[str, Any] = {
            "__slots__": (),
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "revbn_host": self,
            **{name: _hooks_property(name) for name in STEP_HOOKS},
        }
        for base in reversed(cls.__mro__):
            slots = {name: member for name, member in vars(base).items() if isinstance(member, MemberDescriptorType)}
            namespace.update({name: _slot_property(member) for name, member in slots.items()})
        namespace.update({name: _paired_property(name) for name in lists_by_group(self.optimizer)})
        # ABCMeta has to run, or the class would share, and spoil, the caches of its base.
        make: Any = ABCMeta.__new__ if issubclass(type(cls), ABCMeta) else type.__new__
        return make(type(cls), cls.__name__, (_ViewMethods, cls), namespace)


class _ViewMethods:
    """The methods in which a view differs; in the view's class, they take precedence over the optimizer's class."""

    __slots__ = ()
    revbn_host: ClassVar[OptimizerView]

    def __init_subclass__(cls) -> None:
        """Keep the optimizer's `__init_subclass__` from running: it may keep a register, or want keywords."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make another optimizer, as `type(self)(...)` means it."""
        return type(cls.revbn_host.optimizer)(*args, **kwargs)

    def __del__(self) -> None:
        """Do nothing: the optimizer may outlive its view."""

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] # nobody is to set it
        return type(_host(self).optimizer)

    @property
    def param_groups(self) -> list[Group]:
        # A property takes precedence over the shared `__dict__`.
        return _host(self).read_groups()

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        if groups is not self.param_groups:  # `self.param_groups += [...]` assigns the same list again
            raise RuntimeError(
                f"{type(self).__name__}.step() replaces its param_groups, which ScaleUpdateRule cannot follow: "
                "use scale_param_groups"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "param_groups":
            _ViewMethods.param_groups.__set__(self, value)
            return
        host = _host(self)
        host.was_stored = host.was_stored or value is self
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        optimizer = _host(self).optimizer
        return optimizer == (optimizer if other is self else other)

    def __hash__(self) -> int:
        return hash(_host(self).optimizer)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._on_optimizer("__reduce_ex__", protocol)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._on_optimizer("state_dict", *args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._on_optimizer("load_state_dict", *args, **kwargs)

    def register_step_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        return self._on_optimizer("register_step_pre_hook", *args, **kwargs)

    def register_step_post_hook(self, *args: Any, **kwargs: Any) -> Any:
        return self._on_optimizer("register_step_post_hook", *args, **kwargs)

    def _on_optimizer(self, name: str, *args: Any, **kwargs: Any) -> Any:
        host = _host(self)
        host.hand_back()
        return getattr(host.optimizer, name)(*args, **kwargs)


def _host(view: object) -> OptimizerView:
    cls: Any = type(view)  # `cast` would add a call to every step
    return cls.revbn_host


def _hooks_property(name: str) -> property:
    def hooks(view: Any) -> dict[int, Callable[..., Any]]:
        return _host(view).hooks(name)

    return property(hooks)


def _slot_property(member: MemberDescriptorType) -> property:
    """Return a property for an attribute that the optimizer holds outside of its `__dict__`."""

    def read(view: Any) -> Any:
        return member.__get__(_host(view).optimizer)

    def write(view: Any, value: Any) -> None:
        optimizer = _host(view).optimizer
        member.__set__(optimizer, optimizer if value is view else value)

    def delete(view: Any) -> None:
        member.__delete__(_host(view).optimizer)

    return property(read, write, delete)


def _paired_property(name: str) -> property:
    """Return a property for an attribute with an entry for each group, which a step pairs with groups by position."""

    def read(view: Any) -> Any:
        host = _host(view)
        shown, own = len(host.read_groups()), len(host.optimizer.param_groups)
        if shown != own:
            raise RuntimeError(
                f"{type(host.optimizer).__name__}.step() pairs its {name!r}, which has an entry for each of its {own} "
                f"parameter groups, with groups by position, so it would leave out some of the {shown} groups that "
                "ScaleUpdateRule shows it. Nothing was updated. Build this optimizer from scale_param_groups, so that "
                "batch norm scales have groups of their own"
            )
        return vars(host.optimizer)[name]

    def write(view: Any, value: Any) -> None:
        vars(_host(view).optimizer)[name] = value

    return property(read, write)


def _exchanged(args: tuple[Any, ...], old: object, new: object) -> tuple[Any, ...]:
    return tuple(new if value is old else value for value in args)
