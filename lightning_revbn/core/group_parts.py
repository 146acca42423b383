"""Shows an update a parameter group: as it is, or as a copy for every part of it that learns differently."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor

from lightning_revbn.core.coverage import Coverage
from lightning_revbn.core.group_lists import are_values_of
from lightning_revbn.core.optimizer_checks import refuse_divided_group, refuse_settings
from lightning_revbn.core.param_groups import GROUP_MARK, SHIFT_MARK, Group
from lightning_revbn.core.rates import Rates, Role
from lightning_revbn.core.torch_compat import version_of
from lightning_revbn.core.update_watch import ReadWatch

__all__ = ["GroupPlan", "Part"]

_NOTHING: Any = object()
"""Stands for a missing key."""
_ORDER: tuple[Role, ...] = "other", "shift", "scale"
"""The order of parts: the first copy of a group counts most."""
_NUMBERS = frozenset({bool, int, float})
"""Types whose equal values mean the same to every optimizer."""
_NO_TENSORS = _NUMBERS | {str, tuple, list, dict, type(None)}
"""Types of most values in groups. Looking a type up here is faster than asking whether a value is a tensor."""


@dataclass(frozen=True)
class Part:
    """Parameters of a group that learn alike.

    Attributes:
        positions: The positions of the parameters in the group's `params`.
        role: Whether they are scales that learn with lr / c, shifts that learn with lr * k, or neither.
        rates: How they learn; several rules on an optimizer may have different numbers.
        exempt: Whether they take no weight decay.
    """

    positions: tuple[int, ...]
    role: Role
    rates: Rates
    exempt: bool

    @property
    def follows_group(self) -> bool:
        """Whether the parameters learn as their group says."""
        return self.role == "other" and not self.exempt

    @property
    def operation(self) -> tuple[Callable[[Any, float], Any], float]:
        """How the learning rate follows from the group's: a function of it and a number, and the number."""
        return self.rates.operation(self.role)

    def own_values(self, where: str) -> dict[str, Callable[[Any], Any]]:
        """Return functions that compute the part's own values from the group's values.

        Args:
            where: The group's name, for messages.

        Returns:
            Functions by key: for the learning rate of scales and shifts, and for a weight decay that differs from the
            group's weight decay.
        """
        found: dict[str, Callable[[Any], Any]] = {}
        if self.role != "other":
            found["lr"] = functools.partial(self.rates.lr, self.role, where=where)
        if self.exempt:
            found["weight_decay"] = lambda _: 0.0
        elif self.role == "shift":
            found["weight_decay"] = functools.partial(self.rates.weight_decay, self.role)
        return found


class GroupPlan:
    """The parts of a parameter group: found once, and again only when the group's parameters change.

    Args:
        group: The group.
        coverage: The parameters that learn differently from their group.
        where: The group's name, for messages.

    Raises:
        ValueError: If the rule cannot hold for the group (the message says why), or `scale_param_groups` made the group
            with other numbers.

    Attributes:
        doubts: Watches of the parts that, so far, no update has provably read.
        has_own_lr: Whether a part has a learning rate of its own.
    """

    def __init__(self, group: Group, coverage: Coverage, where: str) -> None:
        coverage.refuse_other_marks(group, where)
        self._group = group
        self._where = where
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
            part.rates.lr(part.role, group.get("lr"), where)
        is_plain = all(part.follows_group for part in parts)
        # An optimizer may update a tensor of the group in place, such as a count of steps. A tensor in all copies would
        # be updated once for every part. So only the first copy shares it, and the group sees a single update.
        self._copies = [
            _Copy(part, self._params, where, shares_tensors=index == 0)
            for index, part in enumerate(() if is_plain else parts)
        ]
        self._shown = [copy.shown for copy in self._copies]
        self._operations = [(copy.shown, copy.noted, *copy.part.operation) for copy in self._copies]
        self._own_keys = {key for copy in self._copies for key in copy.own_rates}
        self.has_own_lr = "lr" in self._own_keys
        self.doubts = [ReadWatch(copy.shown, copy.params, has_own_lr="lr" in copy.own_rates) for copy in self._copies]
        # The values that the copies have taken over; _NOTHING where they must take them over again.
        self._taken: Group = {}

    @property
    def is_plain(self) -> bool:
        """Whether every parameter of the group learns as it would without this package."""
        return not self._copies and self._marks == (None, None)

    @property
    def is_divided(self) -> bool:
        """Whether an update finds several groups in place of the group."""
        return len(self._copies) > 1

    @property
    def undivided_lr(self) -> Any:
        """The learning rate that an update finds for parameters other than scales and shifts; None without any."""
        if not self._copies:
            return self._group.get("lr")
        return next((copy.shown.get("lr") for copy in self._copies if "lr" not in copy.own), None)

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
        """Return the groups that the optimizer reads in place of a group.

        Args:
            group: The group, which fits the plan.

        Returns:
            The group itself if all its parameters learn as it says; otherwise a copy of the group for every part. The
            copies are the same objects in every call, so that an optimizer may hold on to them.
        """
        self._group = group
        if not self._copies:
            return [group]
        taken = self._taken
        if group.keys() != taken.keys():
            taken.clear()
            for copy in self._copies:
                copy.clear()
            for key, value in group.items():
                self._take_over(key, value)
            return self._shown
        # Most steps change the learning rate alone: then the loop over all keys is spared.
        lr = group.get("lr")
        if lr is not taken.get("lr") and type(lr) is float:
            for shown, noted, changed, number in self._operations:
                shown["lr"] = noted["lr"] = changed(lr, number)
            taken["lr"] = lr
        if not all(map(is_, group.values(), taken.values())):
            for key, value in group.items():
                if value is not taken[key]:
                    self._take_over(key, value)
        return self._shown

    def _take_over(self, key: str, value: Any) -> None:
        """Copy a value of the group into the copies."""
        if type(value) not in _NO_TENSORS and isinstance(value, Tensor):
            for copy in self._copies:
                copy.take_over_tensor(key, value)
            self._taken[key] = _NOTHING  # it may change in place
            return
        for copy in self._copies:
            own = copy.own.get(key)
            copy.shown[key] = copy.noted[key] = value if own is None else own(value)
        self._taken[key] = value

    def write_back(self, other_rates: Callable[[], Iterable[Any]]) -> None:
        """Carry over to the group the values that the optimizer wrote into its copies.

        Args:
            other_rates: Lists the learning rates of undivided parameters in all groups.

        Raises:
            RuntimeError: If no single group can hold the written values.
        """
        for copy in self._copies:
            shown, noted = copy.shown, copy.noted
            # Most steps write nothing, so this check makes no call for each copy.
            if (
                shown.keys() == noted.keys()
                and all(map(is_, shown.values(), noted.values()))
                and len(copy.params) == copy.count
                and not (copy.versions and any(map(copy.is_in_place, copy.versions)))
            ):
                continue
            if not all(map(self._carry_number, copy.written())):
                break
        else:
            return
        written = [copy.written() for copy in self._copies]
        for key in dict.fromkeys(itertools.chain(*written)):
            writers = [copy for copy, keys in zip(self._copies, written, strict=True) if key in keys]
            if key in ("params", "param_names"):
                raise RuntimeError(self._refusal(key, "in a copy of the group"))
            if key in self._own_keys:
                self._carry_own(key, writers, other_rates, self._copies)
            else:
                self._carry_shared(key, writers)
            for copy in self._copies:
                copy.accept(key)
            self._taken[key] = _NOTHING

    def salvage(self, other_rates: Callable[[], Iterable[Any]]) -> None:
        """Carry over the values that an update wrote before an exception ended it; unreached copies do not count.

        Args:
            other_rates: Lists the learning rates of undivided parameters in all groups.
        """
        written = [copy.written() for copy in self._copies]
        for key in dict.fromkeys(itertools.chain(*written)):
            writers = [copy for copy, keys in zip(self._copies, written, strict=True) if key in keys]
            if key in ("params", "param_names"):
                continue
            # The user must see the exception that is on its way, rather than our refusal of the written values.
            with contextlib.suppress(RuntimeError):
                if key in self._own_keys:
                    speakers = [copy for copy in writers if key not in copy.own]
                    self._carry_own(key, writers, other_rates, speakers or writers)
                else:
                    self._carry_shared(key, writers)
        self._taken = {}

    def _carry_number(self, key: str) -> bool:
        """Carry over a value if it is the same number in all copies, as a count of steps is; tell whether it is."""
        value = self._shown[0].get(key)
        if type(value) not in _NUMBERS or key in self._own_keys:
            return False
        for shown in self._shown:
            other = shown.get(key)
            if type(other) is not type(value) or other != value:
                return False
        self._group[key] = self._taken[key] = value
        for copy in self._copies:
            copy.noted[key] = copy.shown[key]
        return True

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

    def _carry_own(
        self, key: str, writers: Sequence[_Copy], other_rates: Callable[[], Iterable[Any]], checked: Sequence[_Copy]
    ) -> None:
        """Carry over a learning rate or weight decay: a value for the group, from which the parts' values follow."""
        if any(key not in copy.shown for copy in self._copies):
            raise RuntimeError(self._refusal(key, "by deleting it"))
        speaker = next((copy for copy in self._copies if key not in copy.own), None)
        value = self._for_group(key, writers[0], other_rates) if speaker is None else speaker.shown[key]
        for copy in checked:
            expected = copy.own[key](value) if key in copy.own else value
            if not _is_same(copy.shown[key], expected):
                raise RuntimeError(self._refusal(key, "to numbers that follow from no single number for the group"))
        self._group[key] = value

    def _for_group(self, key: str, writer: _Copy, other_rates: Callable[[], Iterable[Any]]) -> Any:
        """Compute the group's value from a part's own value, in a group in which every part has its own value."""
        old, written, part = self._group[key], writer.shown[key], writer.part
        if float(written) == float(writer.own[key](old)):
            return old  # and not a number that differs by rounding
        if key == "weight_decay":
            return old if part.exempt else part.rates.group_weight_decay(part.role, written)
        # An optimizer that writes the same number into all groups ignores the value that it found there.
        if float(written) and any(_is_same(written, lr) for lr in [old, *other_rates()]):
            raise RuntimeError(self._refusal(key, "to the number that other groups have"))
        value = part.rates.group_lr(part.role, written)
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
    """A part as a group of its own: the same dict for the whole life of a plan.

    Args:
        part: The part.
        params: The parameters of the whole group.
        where: The group's name, for messages.
        shares_tensors: Whether the copy holds the group's tensors themselves, rather than clones of them.
    """

    def __init__(self, part: Part, params: Sequence[Tensor], where: str, *, shares_tensors: bool) -> None:
        self.part = part
        self.shown: Group = {}
        self.shares_tensors = shares_tensors
        own = self.params = [params[position] for position in part.positions]
        self.count = len(own)
        self.own_rates = part.own_values(where)
        self.own: dict[str, Callable[[Any], Any]] = {
            "params": lambda _: own,
            "param_names": lambda names: [names[position] for position in part.positions],
            **self.own_rates,
        }
        self.noted: Group = {}
        self.versions: dict[str, int | None] = {}

    def clear(self) -> None:
        """Forget all values."""
        for values in (self.shown, self.noted, self.versions):
            values.clear()

    def take_over_tensor(self, key: str, value: Any) -> None:
        """Take over a tensor of the group, or compute the part's own value from it.

        Args:
            key: The key of the tensor.
            value: The group's tensor.
        """
        if key in self.own:
            value = self.own[key](value)
        elif not self.shares_tensors:
            value = value.clone()
        self.shown[key] = self.noted[key] = value
        self.versions[key] = version_of(value)

    def accept(self, key: str) -> None:
        """Treat the present value under a key as unwritten."""
        if key not in self.shown:
            self.noted.pop(key, None)
            return
        value = self.noted[key] = self.shown[key]
        if type(value) not in _NO_TENSORS and isinstance(value, Tensor):
            self.versions[key] = version_of(value)

    def written(self) -> Sequence[str]:
        """List the keys that the optimizer has set, deleted, or changed in place."""
        shown, noted = self.shown, self.noted
        if shown.keys() == noted.keys():
            keys = [key for key, value in shown.items() if value is not noted[key]]
        else:
            keys = [key for key in {**noted, **shown} if shown.get(key, _NOTHING) is not noted.get(key, _NOTHING)]
        if self.versions:
            keys += [key for key in self.versions if self.is_in_place(key)]
        return keys if len(self.params) == self.count else [*keys, "params"]

    def is_in_place(self, key: str) -> bool:
        """Tell whether the value under a key is the same tensor, changed in place."""
        value = self.shown.get(key)
        return (
            value is self.noted.get(key) and isinstance(value, Tensor) and version_of(value) != self.versions.get(key)
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
    """Sort parameters into parts; a part that learns as the group says comes first."""
    positions: dict[tuple[Role, Rates, bool], list[int]] = {}
    for position, parameter in enumerate(params):
        key = *coverage.way(parameter, group), id(parameter) in coverage.exempt
        positions.setdefault(key, []).append(position)
    # `write_back` asks the first copy: a part without a learning rate of its own holds the group's learning rate.
    parts = [Part(tuple(found), *key) for key, found in positions.items()]
    return sorted(parts, key=lambda part: (_ORDER.index(part.role), part.exempt))


def _is_same(one: Any, other: Any) -> bool:
    """Tell whether two numbers, or tensors of a single element, are equal but for rounding."""
    return one is other or math.isclose(float(one), float(other), rel_tol=1e-6)


@torch.no_grad()
def _fill(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)
