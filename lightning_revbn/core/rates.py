"""Converts learning rates and weight decays of a parameter group to its scales and shifts, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from lightning_revbn.core.arguments import as_number, check_divisor, check_multiplier

__all__ = ["Rates", "Role"]

Role: TypeAlias = Literal["other", "shift", "scale"]
"""The role of a parameter: a batch norm scale, a batch norm shift, or any other parameter."""


@dataclass(frozen=True)
class Rates:
    """Scales learn with lr / divisor, shifts with lr * multiplier and with weight decay / multiplier.

    So a step moves a shift by lr * multiplier times its gradient, and shrinks it by lr * weight decay as before.

    Attributes:
        divisor: The constant c; values up to 1 leave scales alone.
        multiplier: The factor k; 1 leaves shifts alone.

    Raises:
        TypeError: If the divisor or the multiplier is not a number.
        ValueError: If the divisor or the multiplier is not finite and positive.
    """

    divisor: float = 1.0
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "divisor", check_divisor(self.divisor))
        object.__setattr__(self, "multiplier", check_multiplier(self.multiplier))

    @property
    def divides_scales(self) -> bool:
        """Whether scales learn differently."""
        return self.divisor > 1

    @property
    def multiplies_shifts(self) -> bool:
        """Whether shifts learn differently."""
        return self.multiplier != 1

    def change(self, role: Role) -> bool:
        """Tell whether the parameters of a role learn differently from their group.

        Args:
            role: The role.

        Returns:
            Whether they do.
        """
        return self.divides_scales if role == "scale" else self.multiplies_shifts if role == "shift" else False

    def number(self, role: Role) -> float:
        """Return the number that is set for a role.

        Args:
            role: The role.

        Returns:
            The divisor of scales, the multiplier of shifts, and 1 for all others.
        """
        return self.divisor if role == "scale" else self.multiplier if role == "shift" else 1.0

    def told(self, role: Role) -> str:
        """Describe how a parameter of a role learns.

        Args:
            role: The role.

        Returns:
            A few words, such as `a scale with lr / 100`.
        """
        return f"a {'parameter' if role == 'other' else role} with {self.lr_text(role)}"

    def lr_text(self, role: Role) -> str:
        """Describe the learning rate of a role.

        Args:
            role: The role.

        Returns:
            A formula, such as `lr / 100`.
        """
        return "lr" if role == "other" else f"lr {'/' if role == 'scale' else '*'} {self.number(role):g}"

    def lr(self, role: Role, group_lr: Any, where: str) -> Any:
        """Compute the learning rate of a role; a tensor gives a new tensor, since all groups may share the tensor.

        Args:
            role: The role.
            group_lr: The learning rate of the group: a number of Python or NumPy, or a tensor.
            where: The holder of the learning rate, for the message.

        Returns:
            The learning rate, a number if the group has a number and a tensor if the group has a tensor.

        Raises:
            ValueError: If the group has no learning rate.
        """
        if role == "other":
            return group_lr
        if type(group_lr) is not float and not _is_lr(group_lr):
            raise ValueError(
                f"{where} has lr={group_lr!r}: {'lr / c' if role == 'scale' else 'lr * k'} needs a number or a tensor, "
                "so give the optimizer an explicit lr"
            )
        # NumPy's numbers keep their precision, as in a group that was divided by hand.
        changed, number = self.operation(role)
        return changed(group_lr, number)

    def operation(self, role: Role) -> tuple[Callable[[Any, float], Any], float]:
        """Return how a learning rate follows from the group's learning rate.

        Args:
            role: The role.

        Returns:
            A function of the group's learning rate and a number, and this number.
        """
        return (_divided if role == "scale" else _multiplied), self.number(role)

    def group_lr(self, role: Role, lr: Any) -> Any:
        """Compute the learning rate of the group from the learning rate of a role.

        Args:
            role: The role.
            lr: The learning rate of the role.

        Returns:
            The learning rate of the group.
        """
        return {"other": lambda: lr, "scale": lambda: lr * self.divisor, "shift": lambda: lr / self.multiplier}[role]()

    def weight_decay(self, role: Role, group_weight_decay: Any) -> Any:
        """Compute the weight decay of a role.

        Args:
            role: The role.
            group_weight_decay: The weight decay of the group; some optimizers take None for no weight decay.

        Returns:
            The weight decay.
        """
        if role != "shift" or group_weight_decay is None:
            return group_weight_decay
        return group_weight_decay / self.multiplier

    def group_weight_decay(self, role: Role, weight_decay: Any) -> Any:
        """Compute the weight decay of the group from the weight decay of a role.

        Args:
            role: The role.
            weight_decay: The weight decay of the role.

        Returns:
            The weight decay of the group.
        """
        return weight_decay * self.multiplier if role == "shift" and weight_decay is not None else weight_decay


def _divided(rate: Any, number: float) -> Any:
    return rate / number


def _multiplied(rate: Any, number: float) -> Any:
    return rate * number


def _is_lr(lr: object) -> bool:
    if isinstance(lr, (int, float, Tensor)):
        return not isinstance(lr, bool)
    return not isinstance(lr, str) and as_number(lr) is not None
