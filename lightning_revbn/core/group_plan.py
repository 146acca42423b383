"""How one parameter group looks to an update: as it is, or as a copy for every part of it that learns differently."""

from __future__ import annotations

from collections.abc import Collection
from operator import is_

from torch import Tensor

from lightning_revbn.core.param_groups import GROUP_MARK, Group, Part, divide_lr, parts_of

__all__ = ["GroupPlan"]


class GroupPlan:
    """The parts of one parameter group: found once, and again only when the group's parameters change.

    Args:
        group: The group.
        scales: The `id` of every parameter that learns with lr / c. In a group of `scale_param_groups` none does, since
            its learning rate is divided already.
        exempt: The `id` of every parameter that takes no weight decay.
    """

    def __init__(self, group: Group, scales: Collection[int], exempt: Collection[int]) -> None:
        self._params: list[Tensor] = list(group["params"])
        self._is_marked = GROUP_MARK in group
        self._parts = parts_of(self._params, () if self._is_marked else scales, exempt)
        # Worked out here rather than in `copy_into_parts` and `write_back`, which run at every step.
        self._params_of_parts = [[self._params[position] for position in part.positions] for part in self._parts]
        self._own_keys = _own_keys(self._parts[0]) if self._parts else frozenset[str]()
        self._is_whole = not any(part.divided or part.exempt for part in self._parts)
        self._first_copy: tuple[Group, Group] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether every parameter of the group learns as it would without any of this package."""
        return self._is_whole and not self._is_marked

    def fits(self, group: Group) -> bool:
        """Tell whether the plan holds for a group.

        Args:
            group: The group.

        Returns:
            True if the group has the same parameters in the same order, and the mark only if it had it before.
        """
        params = group["params"]
        # Identity, since == of two parameters compares their values; `map` runs no Python code per parameter.
        return (
            len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and (GROUP_MARK in group) == self._is_marked
        )

    def copy_into_parts(self, group: Group, divisor: float) -> list[Group]:
        """Return what the optimizer reads in place of a group.

        Args:
            group: The group, which fits the plan.
            divisor: The constant c.

        Returns:
            A copy of the group for every part; the group itself if nothing in it is divided or exempt.
        """
        if self._is_whole:
            return [group]
        # An optimizer may update a tensor of the group in place, such as a count of steps. Were it one tensor in all
        # copies, it would be updated once for every part. The first copy shares it, so the group sees one update.
        copies = [
            _copy(group, part, params, divisor, share_tensors=index == 0)
            for index, (part, params) in enumerate(zip(self._parts, self._params_of_parts, strict=True))
        ]
        self._first_copy = group, copies[0]
        return copies

    def write_back(self) -> None:
        """Carry over to the group what the optimizer wrote into its copies, which all parts write alike.

        The first copy speaks for all, but for the values that are its part's own.
        """
        if self._first_copy is None:
            return
        group, copy = self._first_copy
        self._first_copy = None
        for key, value in copy.items():
            if key not in self._own_keys and (key not in group or group[key] is not value):
                group[key] = value


def _copy(group: Group, part: Part, params: list[Tensor], divisor: float, *, share_tensors: bool) -> Group:
    """Copy a group for one of its parts, with the part's parameters, learning rate and weight decay."""
    copy = group.copy()
    copy["params"] = params
    if "param_names" in copy:
        copy["param_names"] = [group["param_names"][position] for position in part.positions]
    if not share_tensors:
        copy.update({key: value.clone() for key, value in copy.items() if isinstance(value, Tensor)})
    if part.divided:
        copy["lr"] = divide_lr(group.get("lr"), divisor, "a parameter group")
    # A group without the key belongs to an optimizer without weight decay, which might refuse to see one.
    if part.exempt and "weight_decay" in copy:
        copy["weight_decay"] = 0.0
    return copy


def _own_keys(part: Part) -> frozenset[str]:
    """Return the keys under which the copy for a part holds values that are not the group's."""
    return frozenset(["params", "param_names", *["lr"] * part.divided, *["weight_decay"] * part.exempt])
