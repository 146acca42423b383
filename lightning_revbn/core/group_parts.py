"""How one parameter group looks to an update: as it is, or as a copy for every part of it that learns differently."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor

from lightning_revbn.core.group_lists import are_values_of
from lightning_revbn.core.optimizer_checks import refuse_divided_group, refuse_settings
from lightning_revbn.core.param_groups import GROUP_MARK, SHIFT_MARK, Group
from lightning_revbn.core.rates import Rates, Role
from lightning_revbn.core.torch_compat import version_of

__all__ = ["Coverage", "GroupPlan", "Part"]

_NOTHING: Any = object()
"""Stands for a key that is not there."""


@dataclass(frozen=True)
class Coverage:
    """Which parameters learn in a way of their own, by their `id`, and how.

    Attributes:
        scales: Batch norm scales.
        shifts: Batch norm shifts.
        exempt: Parameters that take no weight decay.
        rates: How scales and shifts learn.
    """

    scales: Mapping[int, Tensor]
    shifts: Mapping[int, Tensor]
    exempt: Mapping[int, Tensor]
    rates: Rates

    def __bool__(self) -> bool:
        """Whether any parameter learns differently from its group."""
        return bool(self.covered)

    @property
    def covered(self) -> set[int]:
        """The `id` of every parameter that learns differently from its group."""
        found = set(self.exempt)
        if self.rates.divides_scales:
            found |= self.scales.keys()
        if self.rates.multiplies_shifts:
            found |= self.shifts.keys()
        return found

    def role(self, parameter: Tensor, group: Group) -> Role:
        """Tell how a parameter of a group learns.

        Args:
            parameter: The parameter.
            group: Its group. In a group of `scale_param_groups` the learning rate is what it is to be already.

        Returns:
            Whether the parameter is a scale or a shift that learns differently from the group.
        """
        if self.rates.divides_scales and id(parameter) in self.scales and GROUP_MARK not in group:
            return "scale"
        if self.rates.multiplies_shifts and id(parameter) in self.shifts and SHIFT_MARK not in group:
            return "shift"
        return "other"

    def refuse_other_marks(self, group: Group, where: str) -> None:
        """Raise if `scale_param_groups` has made a group of covered parameters with another number.

        Args:
            group: The group.
            where: What the group is called, for the message.

        Raises:
            ValueError: If so; the message has both numbers.
        """
        for mark, own, number, name in (
            (GROUP_MARK, self.scales, self.rates.divisor, "divisor"),
            (SHIFT_MARK, self.shifts, self.rates.multiplier, "shift multiplier"),
        ):
            if mark in group and float(group[mark]) != number and any(id(p) in own for p in group["params"]):
                raise ValueError(
                    f"{where} was made by scale_param_groups with a {name} of {float(group[mark]):g}, but the rule "
                    f"has a {name} of {number:g}: give both the same number"
                )


@dataclass(frozen=True)
class Part:
    """Parameters of one group that learn alike.

    Attributes:
        positions: Where the parameters stand in the group's `params`.
        role: Whether they are scales that learn with lr / c, shifts that learn with lr * k, or neither.
        exempt: Whether they take no weight decay.
    """

    positions: tuple[int, ...]
    role: Role
    exempt: bool

    @property
    def is_whole_group(self) -> bool:
        """Whether the parameters learn as their group says."""
        return self.role == "other" and not self.exempt

    def has_own(self, key: str) -> bool:
        """Tell whether the part's value under a key is worked out from the group's value.

        Args:
            key: The key.

        Returns:
            True for the learning rate of scales and shifts, and for a weight decay that the group does not say.
        """
        return (key == "lr" and self.role != "other") or (
            key == "weight_decay" and (self.exempt or self.role == "shift")
        )

    def value(self, key: str, of_group: Any, rates: Rates, where: str) -> Any:
        """Work out the part's value under a key that has its own.

        Args:
            key: `"lr"` or `"weight_decay"`.
            of_group: The group's value.
            rates: How scales and shifts learn.
            where: What the group is called, for messages.

        Returns:
            The value.
        """
        if key == "lr":
            return rates.lr(self.role, of_group, where)
        return 0.0 if self.exempt else rates.weight_decay(self.role, of_group)


class GroupPlan:
    """The parts of one parameter group: found once, and again only when the group's parameters change.

    Args:
        group: The group.
        coverage: Which parameters learn in a way of their own.
        where: What the group is called, for messages.

    Raises:
        ValueError: If the group has no learning rate to work out another from, or was made by `scale_param_groups` with
            other numbers.
    """

    def __init__(self, group: Group, coverage: Coverage, where: str) -> None:
        coverage.refuse_other_marks(group, where)
        self._group = group
        self._where = where
        self._rates = coverage.rates
        self._params: list[Tensor] = list(group["params"])
        self._marks = group.get(GROUP_MARK), group.get(SHIFT_MARK)
        parts = _parts(self._params, group, coverage)
        refuse_settings(
            group,
            where,
            divides_lr=any(part.role != "other" for part in parts),
            changes_weight_decay=any(part.exempt or part.role == "shift" for part in parts),
        )
        if len(parts) > 1:
            refuse_divided_group(group, where, has_faster=any(part.role == "shift" for part in parts))
        for part in parts:
            if part.has_own("lr"):
                part.value("lr", group.get("lr"), coverage.rates, where)
        is_whole = all(part.is_whole_group for part in parts)
        # An optimizer may update a tensor of the group in place, such as a count of steps. Were it one tensor in all
        # copies, it would be updated once for every part. The first copy shares it, so the group sees one update.
        self._copies = [
            _Copy(part, self._params, coverage.rates, where, shares_tensors=index == 0)
            for index, part in enumerate(() if is_whole else parts)
        ]
        self._shown = [copy.shown for copy in self._copies]
        # What the copies have taken over, and the keys to take over anew however they look.
        self._taken: Group = {}
        self._unsure: set[str] = set()

    @property
    def is_plain(self) -> bool:
        """Whether every parameter of the group learns as it would without any of this package."""
        return not self._copies and self._marks == (None, None)

    @property
    def is_divided(self) -> bool:
        """Whether an update finds more than one group in place of the group."""
        return len(self._copies) > 1

    @property
    def undivided_lr(self) -> Any:
        """The learning rate with which an update finds parameters that are neither scales nor shifts; None without."""
        if not self._copies:
            return self._group.get("lr")
        return next((copy.shown.get("lr") for copy in self._copies if not copy.part.has_own("lr")), None)

    def fits(self, group: Group) -> bool:
        """Tell whether the plan holds for a group.

        Args:
            group: The group.

        Returns:
            True if the group has the same parameters in the same order, and the marks that it had before.
        """
        params = group["params"]
        # Identity, since == of two parameters compares their values; `map` runs no Python code per parameter.
        return (
            len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and (group.get(GROUP_MARK), group.get(SHIFT_MARK)) == self._marks
        )

    def show(self, group: Group) -> list[Group]:
        """Return what the optimizer reads in place of a group.

        Args:
            group: The group, which fits the plan.

        Returns:
            The group itself if all of it learns as it says; else a copy of the group for every part. The copies are the
            same objects in every call, so that an optimizer may hold on to them.
        """
        self._group = group
        if not self._copies:
            return [group]
        if self._unsure or not _are_same(group, self._taken):
            self._take_over(group)
        return self._shown

    def _take_over(self, group: Group) -> None:
        taken, self._taken = self._taken, group.copy()
        if group.keys() == taken.keys():
            # Few keys change from step to step, and it takes long to find out what kind of value each one has.
            keys = [key for key, value in group.items() if value is not taken[key] or key in self._unsure]
        else:
            keys = list(group)
            for copy in self._copies:
                copy.clear()
        for copy in self._copies:
            copy.take_over(group, keys)
        # Tensors may change in place.
        self._unsure.difference_update(keys)
        self._unsure.update(key for key in keys if isinstance(group[key], Tensor))

    def forget(self) -> None:
        """Drop what was written into the copies by a step that came to no end."""
        self._taken = {}

    def write_back(self, other_rates: Callable[[], Iterable[Any]]) -> None:
        """Carry over to the group what the optimizer wrote into its copies.

        Args:
            other_rates: Lists the learning rates of undivided parameters in all groups.

        Raises:
            RuntimeError: If the parts cannot have what was written and one group to hold it.
        """
        for copy in self._copies:
            if not copy.is_as_shown():
                break
        else:
            return
        written = [copy.written() for copy in self._copies]
        for key in {key: None for keys in written for key in keys}:
            writers = [copy for copy, keys in zip(self._copies, written, strict=True) if key in keys]
            if key in ("params", "param_names"):
                raise RuntimeError(self._refusal(key, "in a copy of the group"))
            if any(copy.part.has_own(key) for copy in self._copies):
                self._carry_own(key, writers, other_rates)
            else:
                self._carry_shared(key, writers)
            self._unsure.add(key)
        for copy in self._copies:
            copy.note()

    def _carry_shared(self, key: str, writers: Sequence[_Copy]) -> None:
        """Carry over a value that all parts share with the group, from the first copy in which it was written."""
        writer = writers[0]
        value = writer.shown.get(key, _NOTHING)
        if self.is_divided and are_values_of(value, writer.shown["params"]):
            raise RuntimeError(self._refusal(key, "to values for each of its parameters"))
        by_parameter = _joined([copy.shown.get(key) for copy in writers])
        if value is _NOTHING:
            self._group.pop(key, None)
        elif by_parameter:
            self._group[key] = by_parameter
        elif not writer.is_in_place(key):
            self._group[key] = value
        elif not writer.shares_tensors:
            _fill(self._group[key], value)

    def _carry_own(self, key: str, writers: Sequence[_Copy], other_rates: Callable[[], Iterable[Any]]) -> None:
        """Carry over a learning rate or weight decay: one value for the group, which must give every part's again."""
        if any(key not in copy.shown for copy in self._copies):
            raise RuntimeError(self._refusal(key, "by deleting it"))
        speaker = next((copy for copy in self._copies if not copy.part.has_own(key)), None)
        value = self._for_group(key, writers[0], other_rates) if speaker is None else speaker.shown[key]
        for copy in self._copies:
            expected = copy.part.value(key, value, self._rates, self._where) if copy.part.has_own(key) else value
            if not _is_same(copy.shown[key], expected):
                raise RuntimeError(self._refusal(key, "to numbers that follow from no single number for the group"))
        self._group[key] = value

    def _for_group(self, key: str, writer: _Copy, other_rates: Callable[[], Iterable[Any]]) -> Any:
        """Work out the group's value from a part's own, in a group in which every part has its own."""
        old, written, part = self._group[key], writer.shown[key], writer.part
        if float(written) == float(part.value(key, old, self._rates, self._where)):
            return old  # and not a number that differs by rounding
        if key == "weight_decay":
            return old if part.exempt else self._rates.group_weight_decay(part.role, written)
        # An optimizer that writes one number into all groups takes no account of what it found there.
        if float(written) and any(_is_same(written, lr) for lr in [old, *other_rates()]):
            raise RuntimeError(self._refusal(key, "to the number that other groups have"))
        value = self._rates.group_lr(part.role, written)
        if writer.is_in_place(key):
            _fill(old, value)
            return old
        return value

    def _refusal(self, key: str, how: str) -> str:
        return (
            f"the optimizer's step has changed {key!r} of {self._where} {how}, while scales, shifts and other "
            "parameters of it learn differently: use scale_param_groups for this optimizer"
        )


class _Copy:
    """A part as a group of its own: one dict for the whole life of a plan.

    Args:
        part: The part.
        params: The parameters of the whole group.
        rates: How scales and shifts learn.
        where: What the group is called, for messages.
        shares_tensors: Whether the copy holds the group's tensors themselves, rather than clones of them.
    """

    def __init__(self, part: Part, params: Sequence[Tensor], rates: Rates, where: str, *, shares_tensors: bool) -> None:
        self.part = part
        self.shown: Group = {}
        self.shares_tensors = shares_tensors
        self._rates = rates
        self._where = where
        self._params = [params[position] for position in part.positions]
        self._count = len(self._params)
        self._noted: Group = {}
        self._versions: dict[str, int | None] = {}

    def clear(self) -> None:
        """Forget all values."""
        for values in (self.shown, self._noted, self._versions):
            values.clear()

    def take_over(self, group: Group, keys: Sequence[str]) -> None:
        """Take over values of the group, and work out the part's own from them.

        Args:
            group: The group.
            keys: The keys of the values.
        """
        for key in keys:
            value = self._value(group, key)
            self.shown[key] = self._noted[key] = value
            if isinstance(value, Tensor):
                self._versions[key] = version_of(value)
            else:
                self._versions.pop(key, None)

    def _value(self, group: Group, key: str) -> Any:
        if key == "params":
            return self._params
        if key == "param_names":
            return [group[key][position] for position in self.part.positions]
        if self.part.has_own(key):
            return self.part.value(key, group[key], self._rates, self._where)
        value = group[key]
        return value.clone() if isinstance(value, Tensor) and not self.shares_tensors else value

    def note(self) -> None:
        """Take the values as they are for those that were not written."""
        self._noted = self.shown.copy()
        self._versions = {key: version_of(value) for key, value in self.shown.items() if isinstance(value, Tensor)}

    def is_as_shown(self) -> bool:
        """Tell, fast, whether the optimizer has written nothing."""
        return (
            _are_same(self.shown, self._noted)
            and len(self._params) == self._count
            and not (self._versions and any(map(self.is_in_place, self._versions)))
        )

    def written(self) -> list[str]:
        """List the keys that the optimizer has set, deleted, or changed in place."""
        shown, noted = self.shown, self._noted
        keys = [key for key in {**noted, **shown} if shown.get(key, _NOTHING) is not noted.get(key, _NOTHING)]
        if len(self._params) != self._count:
            keys.append("params")
        return keys + [key for key in self._versions if self.is_in_place(key)]

    def is_in_place(self, key: str) -> bool:
        """Tell whether the value under a key is the tensor that it was, with other numbers in it."""
        value = self.shown.get(key)
        return (
            value is self._noted.get(key) and isinstance(value, Tensor) and version_of(value) != self._versions.get(key)
        )


def _joined(values: Sequence[Any]) -> dict[Tensor, Any]:
    """Join dicts that parts have made for their own parameters, such as the state of GrokAdamW; {} for other values."""
    joined: dict[Tensor, Any] = {}
    for value in values:
        if not isinstance(value, dict) or not all(isinstance(key, Tensor) for key in cast("dict[Any, Any]", value)):
            return {}
        joined.update(cast("dict[Tensor, Any]", value))
    return joined


def _parts(params: Sequence[Tensor], group: Group, coverage: Coverage) -> list[Part]:
    """Sort parameters into parts, the part that learns as the group says first if there is one."""
    positions: dict[tuple[Role, bool], list[int]] = {}
    for position, parameter in enumerate(params):
        key = coverage.role(parameter, group), id(parameter) in coverage.exempt
        positions.setdefault(key, []).append(position)
    # `write_back` asks the first copy: a part without a learning rate of its own says what the group's is to be.
    return [Part(tuple(found), role, exempt) for (role, exempt), found in sorted(positions.items(), key=_order)]


def _order(item: tuple[tuple[Role, bool], list[int]]) -> tuple[int, bool]:
    (role, exempt), _ = item
    return ("other", "shift", "scale").index(role), exempt


def _are_same(group: Group, copy: Group) -> bool:
    """Tell whether a group still has the keys, in their order, and the very objects that it had when it was copied."""
    return list(group) == list(copy) and all(map(is_, group.values(), copy.values()))


def _is_same(one: Any, other: Any) -> bool:
    """Tell whether two numbers, or tensors of one element, are equal but for rounding."""
    return one is other or math.isclose(float(one), float(other), rel_tol=1e-6)


@torch.no_grad()
def _fill(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)
