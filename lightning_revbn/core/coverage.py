"""Tells which parameters learn differently from their group, and how, for all update rules on an optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_revbn.core.param_groups import GROUP_MARK, SHIFT_MARK, Group
from lightning_revbn.core.rates import Rates, Role

__all__ = ["Coverage", "Way"]

Way: TypeAlias = tuple[Role, Rates]
"""How a parameter learns: its role, and its rates."""
_LIKE_GROUP: Way = "other", Rates()
_MARKS: Mapping[Role, tuple[str, str]] = {
    "scale": (GROUP_MARK, "divisor"),
    "shift": (SHIFT_MARK, "shift multiplier"),
}
"""The key that `scale_param_groups` sets in a group of such parameters, and the name of its number."""
_SHOWN = 3


@dataclass(frozen=True)
class Coverage:
    """The parameters that learn differently from their group, by `id`, and how they learn.

    Attributes:
        ways: How scales and shifts learn, even if they learn as their group does.
        exempt: Parameters that take no weight decay.
        parameters: All these parameters, held so that no other tensor can take over an `id`.
    """

    ways: Mapping[int, Way] = field(default_factory=dict[int, Way])
    exempt: frozenset[int] = frozenset()
    parameters: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, scales: Iterable[Tensor], shifts: Iterable[Tensor], exempt: Iterable[Tensor], rates: Rates) -> Self:
        """Cover parameters with the same pair of rates.

        Args:
            scales: Batch norm scales.
            shifts: Batch norm shifts.
            exempt: Parameters that take no weight decay.
            rates: How scales and shifts learn.

        Returns:
            The coverage.

        Raises:
            TypeError: If a parameter is not a tensor.
            ValueError: If a parameter is among the scales and among the shifts.
        """
        scales, shifts = _tensors("scales", scales), _tensors("shifts", shifts)
        exempt = _tensors("weight_decay_exempt", exempt)
        ways: dict[int, Way] = {id(scale): ("scale", rates) for scale in scales}
        if any(id(shift) in ways for shift in shifts):
            raise ValueError("a parameter is among the scales and among the shifts: pass it in a single list")
        ways.update({id(shift): ("shift", rates) for shift in shifts})
        parameters = {id(parameter): parameter for parameter in (*scales, *shifts, *exempt)}
        return cls(ways, frozenset(map(id, exempt)), tuple(parameters.values()))

    @classmethod
    def joined(cls, parts: Sequence[Coverage], where: str) -> Coverage:
        """Join the coverages of several rules.

        Args:
            parts: The coverage of each rule.
            where: The kind of their optimizer, for the message.

        Returns:
            The coverage of all rules together. A parameter takes no weight decay if any rule exempts it.

        Raises:
            ValueError: If two rules have the same scale or shift.
        """
        ways: dict[int, Way] = {}
        for part in parts:
            twice = [parameter for parameter in part.parameters if id(parameter) in part.ways and id(parameter) in ways]
            if twice:
                raise ValueError(_claimed_twice(twice, ways, part.ways, where))
            ways.update(part.ways)
        return cls(
            ways,
            frozenset(found for part in parts for found in part.exempt),
            tuple(parameter for part in parts for parameter in part.parameters),
        )

    def __bool__(self) -> bool:
        """Whether any parameter learns differently from its group."""
        return bool(self.covered)

    @property
    def covered(self) -> set[int]:
        """The `id` of every parameter that learns differently from its group."""
        return {*self.exempt, *(found for found, (role, rates) in self.ways.items() if rates.change(role))}

    @property
    def missed(self) -> str:
        """The effects that an update loses by bypassing the rules, as half a sentence."""
        ways: Iterable[Way] = dict.fromkeys(way for way in self.ways.values() if way[1].change(way[0]))
        missed = [f"{role}s did not learn with {rates.lr_text(role)}" for role, rates in ways]
        return " and ".join(missed) or "parameters decayed that take no weight decay"

    def way(self, parameter: Tensor, group: Group) -> Way:
        """Tell how a parameter of a group learns.

        Args:
            parameter: The parameter.
            group: Its group. A group made by `scale_param_groups` already has the changed learning rate.

        Returns:
            The role and the rates of a scale or shift that learns differently from the group. For all other parameters
            the role is `"other"`, and the rates change nothing.
        """
        role, rates = way = self.ways.get(id(parameter), _LIKE_GROUP)
        return way if rates.change(role) and _MARKS[role][0] not in group else _LIKE_GROUP

    def refuse_other_marks(self, group: Group, where: str) -> None:
        """Raise if `scale_param_groups` has made a group of scales or shifts with another number.

        Args:
            group: The group.
            where: The group's name, for the message.

        Raises:
            ValueError: If so; the message has both numbers.
        """
        for of, (mark, name) in _MARKS.items():
            if mark not in group:
                continue
            made_with = float(group[mark])
            for parameter in group["params"]:
                role, rates = self.ways.get(id(parameter), _LIKE_GROUP)
                if role == of and rates.number(role) != made_with:
                    raise ValueError(
                        f"{where} was made by scale_param_groups with a {name} of {made_with:g}, but the rule "
                        f"has a {name} of {rates.number(role):g}: give both the same number"
                    )

    def refuse_other_groups(self, optimizer: Optimizer) -> None:
        """Raise if `scale_param_groups` has made one of an optimizer's groups with another number.

        Args:
            optimizer: The optimizer.

        Raises:
            ValueError: If so; the message has both numbers.
        """
        for index, group in enumerate(optimizer.param_groups):
            self.refuse_other_marks(group, f"parameter group {index} of {type(optimizer).__name__}")


def _tensors(argument: str, parameters: Iterable[Tensor]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for parameter in parameters:
        if not isinstance(parameter, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{argument} takes parameters, got {type(parameter).__name__}")
        found[id(parameter)] = parameter
    return list(found.values())


def _claimed_twice(twice: Sequence[Tensor], there: Mapping[int, Way], here: Mapping[int, Way], where: str) -> str:
    """Describe the parameters that two rules claim by shapes and rates, since an optimizer knows no names of layers."""
    kinds: Counter[str] = Counter()
    for parameter in twice:
        (role, rates), (own_role, own_rates) = there[id(parameter)], here[id(parameter)]
        kinds[f"of shape {tuple(parameter.shape)} ({rates.told(role)} there, {own_rates.told(own_role)} here)"] += 1
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_SHOWN))
    return (
        f"this {where} has a ScaleUpdateRule already for {len(twice)} of these scales and shifts: {shown}"
        f"{' and others' if len(kinds) > _SHOWN else ''}. Give each layer to one rule, by include and exclude, or "
        "remove() that rule first"
    )
