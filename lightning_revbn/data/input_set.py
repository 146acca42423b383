"""The inputs of a DataModule: a single input, or several with names, each with its settings and statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from lightning_revbn.core.batch_places import Key, Place, Step, path_of, places_in
from lightning_revbn.core.input_checks import InputError, InputPart
from lightning_revbn.core.input_norm import InputNorm, MissingStatisticsError, OnlineStandardizer
from lightning_revbn.core.input_state import SavedInput, read_state
from lightning_revbn.core.joint_training import InputParts, naming, train_together
from lightning_revbn.data.batches import exact_path, find_tensor, replace_tensor

__all__ = ["Found", "InputSet", "NamedInput", "Selected"]

Found: TypeAlias = Tensor | list[Tensor | None] | None
"""The tensor of an input in a batch, or a list of tensors if its key lists places; None for a place the batch lacks."""
Selected: TypeAlias = Found | dict[str, Found]
"""The input, or a dict with the input of each name."""

_NO_MASK = (
    ". eval_mask_key names the mask in batches of evaluation. Where these have none, put None there, or override "
    "select_mask"
)


class NamedInput:
    """An input: its place in batches, and its standardiser.

    Args:
        name: The name of the input; empty for a single input without a name.
        settings: The settings of the input.

    Attributes:
        online: The standardiser; a pass or a reset puts a new standardiser here.
    """

    def __init__(self, name: str, settings: InputNorm) -> None:
        self.name = name
        self.settings = settings
        self.online = OnlineStandardizer(settings, name=name)

    @property
    def label(self) -> str:
        """The name of the input in messages."""
        return f"input {self.name!r}" if self.name else "input"

    def fresh(self) -> OnlineStandardizer:
        """Return a standardiser that has learned nothing, with the same scale."""
        return OnlineStandardizer(self.settings, self.online.scale if self.online.knows_scale else None, self.name)

    def check(self) -> None:
        """Raise if a training batch since the last check had a fault; on accelerators this waits for the device."""
        with naming(self.name):
            self.online.check()

    def require_statistics(self) -> None:
        """Raise `MissingStatisticsError` with the name of the input before the first statistics."""
        try:
            self.online.statistics()
        except MissingStatisticsError as error:
            raise MissingStatisticsError(self._named(error)) from error

    def release(self) -> str | None:
        """Let training batches add to the statistics again; return the reason if the statistics stay frozen."""
        try:
            self.online.learner.hold(is_held=False)
        except RuntimeError as error:
            return self._named(error)
        return None

    def select(self, batch: Any, *, is_training: bool) -> Found:
        """Return the raw input of a batch.

        Args:
            batch: The batch.
            is_training: Whether it is a training batch.

        Returns:
            The tensor, or a list of tensors if the key lists places; None for a place that the batch lacks.

        Raises:
            TypeError: If the key does not lead to a tensor. If it lists places, a training batch must have all of them,
                a batch of evaluation any of them.
        """
        key, _ = self.settings.places(is_training=is_training)
        is_other = not is_training and self.settings.eval_key is not None
        argument = "eval_key" if is_other else "key"
        found = [_found_or_error(batch, place, argument) for place in places_in(key)]
        missing = [error for error in found if isinstance(error, TypeError)]
        if missing and (is_training or len(missing) == len(found)):
            hint = "" if is_training or is_other else ". eval_key names the input in batches of evaluation"
            raise TypeError(f"{missing[0]}{hint}") from missing[0]
        tensors = [None if isinstance(own, TypeError) else own for own in found]
        return tensors if isinstance(key, list) else tensors[0]

    def select_mask(self, batch: Any, *, is_training: bool) -> Found:
        """Return the mask of the input, a list of masks if the key of the mask lists places, or None without a mask."""
        _, key = self.settings.places(is_training=is_training)
        is_other = not is_training and self.settings.eval_mask_key is not None
        argument = "eval_mask_key" if is_other else "mask_key"
        if key is None:
            return None
        places: list[Any] = [batch]  # a single mask for all places does not depend on which places the batch has
        if isinstance(key, list):
            found = self.select(batch, is_training=is_training)
            places = found if isinstance(found, list) else [found]
        masks = [
            None if values is None else _found_or_error(batch, place, argument)
            for place, values in zip(places_in(key), places, strict=True)
        ]
        for error in masks:
            if isinstance(error, TypeError):
                hint = "" if is_training or is_other else _NO_MASK
                raise TypeError(f"{error}{hint}") from error
        tensors = [mask for mask in masks if not isinstance(mask, TypeError)]
        return tensors if isinstance(key, list) else tensors[0]

    def replace(self, batch: Any, found: Found, *, is_training: bool) -> Any:
        """Return a copy of a batch with another input, in the structure of the result of `select`."""
        key, _ = self.settings.places(is_training=is_training)
        values = found if isinstance(found, list) else [found]
        for place, value in zip(places_in(key), values, strict=True):
            if value is not None:
                batch = replace_tensor(batch, place, value)
        return batch

    def evaluate(self, parts: Sequence[InputPart], dtype: torch.dtype) -> list[Tensor]:
        """Standardise the parts of a batch of evaluation."""
        with naming(self.name):
            try:
                return [self.online.evaluate(*part, dtype=dtype) for part in parts]
            except InputError as error:
                if not isinstance(self.settings.key, list) or self.settings.eval_key is not None:
                    raise
                raise InputError(f"{error}. eval_key names the input in batches of evaluation") from error

    def preview(self, parts: Sequence[InputPart], dtype: torch.dtype) -> list[Tensor]:
        """Standardise the parts of a batch of the sanity check: before the first statistics, by the batch's own."""
        if self.online.has_statistics:
            return self.evaluate(parts, dtype)
        own = InputParts(self.name, self.online.stand_in(), parts)
        try:
            return train_together([own], dtype, None, 1, torch.device("cpu"))[0]
        except InputError as error:
            raise InputError(f"the sanity check normalises each batch by itself: {error}") from error

    def _named(self, error: Exception) -> str:
        return f"{self.label}: {error}" if self.name else str(error)


class InputSet:
    """All inputs of a DataModule.

    Args:
        given: The settings of a single input, or a mapping of names to settings.

    Attributes:
        given: The settings; in a mapping, settings without a key have the name for the key.
        inputs: The inputs, in the order of the mapping.

    Raises:
        TypeError: If `given` is neither, or the mapping is empty.
        ValueError: If two inputs have the same place in a batch.
    """

    def __init__(self, given: object) -> None:
        if isinstance(given, InputNorm):
            self.given: InputNorm | dict[str, InputNorm] = given
            self.inputs = [NamedInput("", given)]
            return
        if not isinstance(given, Mapping):
            raise TypeError(f"input_norm must be an InputNorm, got {given!r}")
        self.given = {}
        for name, own in cast("Mapping[Any, Any]", given).items():
            if not isinstance(name, str) or not name or not isinstance(own, InputNorm):
                raise TypeError(f"input_norm must have an InputNorm for each name, got {name!r}: {own!r}")
            self.given[name] = own if own.key is not None else replace(own, key=name)
        if not self.given:
            raise TypeError("input_norm must have an input, got an empty mapping")
        self.inputs = [NamedInput(name, own) for name, own in self.given.items()]
        for is_training in (True, False):
            _refuse_shared_places({one.name: one.settings.places(is_training=is_training)[0] for one in self.inputs})

    @property
    def is_frozen(self) -> bool:
        """Whether training batches no longer change any statistics, so ranks need not communicate."""
        return all(one.online.is_frozen for one in self.inputs)

    def __getitem__(self, name: str | None) -> NamedInput:
        """Return an input by name; None is a single input without a name."""
        found = [one for one in self.inputs if one.name == (name or "")]
        if found:
            return found[0]
        names = ", ".join(repr(one.name) for one in self.inputs)
        if not self.inputs[0].name:
            raise ValueError(f"the only input has no name, got {name!r}")
        have = "there are several inputs" if len(self.inputs) > 1 else "the only input has a name"
        raise ValueError(
            f"{have}, {names}: give {'any of these names' if len(self.inputs) > 1 else 'its name'}, got {name!r}"
        )

    def select(self, batch: Any, *, is_training: bool) -> Selected:
        """Return the input of a batch, or a dict with the input of each name."""
        selected = self._each(lambda one: one.select(batch, is_training=is_training))
        self._refuse_places_that_meet(batch, self._listed(selected), is_training=is_training)
        return selected

    def select_mask(self, batch: Any, *, is_training: bool) -> Selected:
        """Return the mask of the input, or a dict with the mask of each name."""
        return self._each(lambda one: one.select_mask(batch, is_training=is_training))

    def replace(self, batch: Any, selected: Selected, *, is_training: bool) -> Any:
        """Return a copy of a batch with other inputs."""
        for one, found in zip(self.inputs, self._listed(selected), strict=True):
            batch = one.replace(batch, found, is_training=is_training)
        return batch

    def parts(self, selected: Selected, masks: Selected) -> list[InputParts]:
        """Pair raw values with their masks, without the places that the batch lacks.

        Args:
            selected: The result of `select_input`, which the user may have overridden.
            masks: The result of `select_mask`.

        Returns:
            The parts of each input.

        Raises:
            TypeError: If the results have another structure than the inputs.
        """
        found: list[InputParts] = []
        for one, values, mask in zip(self.inputs, self._listed(selected), self._listed(masks), strict=True):
            places = values if isinstance(values, list) else [values]
            each = mask if isinstance(mask, list) else [mask] * len(places)
            _refuse_other_structure(places, each)
            own = [InputPart(x, valid) for x, valid in zip(places, each, strict=True) if x is not None]
            found.append(InputParts(one.name, one.online, own))
        return found

    def filled(self, selected: Selected, results: Sequence[Sequence[Tensor]]) -> Selected:
        """Put results into the structure of `selected`.

        Args:
            selected: The result of `select_input`.
            results: A tensor for each part of each input.

        Returns:
            The results in that structure, with None for places that the batch lacks.
        """
        filled: list[Found] = []
        for found, own in zip(self._listed(selected), results, strict=True):
            queue = iter(own)
            if isinstance(found, list):
                filled.append([None if values is None else next(queue) for values in found])
            else:
                filled.append(None if found is None else next(queue))
        return self._structured(filled)

    def lack_of(self, state: object) -> str | None:
        """Explain why these inputs cannot evaluate with a state.

        Args:
            state: The result of `state_dict`.

        Returns:
            The reason, with the name of the first such input; None if all inputs can.
        """
        for one, saved in zip(self.inputs, self.read(state), strict=True):
            lack = saved.lacks(one.settings.mode)
            if lack is not None:
                return f"{one.label}: {lack}" if one.name else lack
        return None

    def replace_standardizers(self, learned: Sequence[OnlineStandardizer]) -> None:
        """Replace the standardiser of each input."""
        for one, online in zip(self.inputs, learned, strict=True):
            one.online = online

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the standardiser, or a dict with the state of each name."""
        if not self.inputs[0].name:
            return self.inputs[0].online.state_dict()
        return {one.name: one.online.state_dict() for one in self.inputs}

    def read(self, state: object) -> list[SavedInput]:
        """Check a state without loading it.

        Args:
            state: The result of `state_dict`.

        Returns:
            The checked state of each input.

        Raises:
            ValueError: If the state is damaged or of other inputs.
        """
        return [read_state(state, one.settings) for one, state in zip(self.inputs, self._states(state), strict=True)]

    def load_state_dict(self, state: object) -> None:
        """Load the state of each input, after checking all: an error leaves every input unchanged."""
        self.read(state)
        for one, own in zip(self.inputs, self._states(state), strict=True):
            one.online.load_state_dict(own)

    def _refuse_places_that_meet(self, batch: Any, selected: Sequence[Found], *, is_training: bool) -> None:
        """Raise if two places lead to the same tensor of a batch, which would be normalised twice."""
        owners: dict[tuple[Step, ...], tuple[NamedInput, Place | None]] = {}
        for one, found in zip(self.inputs, selected, strict=True):
            key, _ = one.settings.places(is_training=is_training)
            each = found if isinstance(found, list) else [found]
            for place, values in zip(places_in(key), each, strict=True):
                if values is None:
                    continue
                path = exact_path(batch, place)
                if path in owners:
                    other, first = owners[path]
                    raise TypeError(
                        f"place {first!r} of the {other.label} and place {place!r} of the {one.label} lead to the same "
                        "tensor of a batch, which would be normalised twice. Name each tensor once"
                    )
                owners[path] = (one, place)

    def _states(self, state: object) -> list[object]:
        values: Mapping[Any, object] = cast("Mapping[Any, object]", state) if isinstance(state, Mapping) else {}
        named = [name for name, own in values.items() if isinstance(own, Mapping)]
        own = [one.name for one in self.inputs]
        if own == [""]:
            if named:
                raise ValueError(
                    f"the saved input statistics are of {_listed(named)}, and this DataModule has a single input "
                    "without a name"
                )
            return [state]
        if {*named} != {*own} or len(values) != len(own):
            saved = _listed(named) if named else "a single input without a name"
            raise ValueError(f"the saved input statistics are of {saved}, and this DataModule has {_listed(own)}")
        return [values[name] for name in own]

    def _each(self, find: Callable[[NamedInput], Found]) -> Selected:
        return self._structured([find(one) for one in self.inputs])

    def _structured(self, found: list[Found]) -> Selected:
        if not self.inputs[0].name:
            return found[0]
        return {one.name: own for one, own in zip(self.inputs, found, strict=True)}

    def _listed(self, selected: Selected) -> list[Found]:
        """Return the selected tensors of each input, in order; None if no input has a mask."""
        if not self.inputs[0].name:
            return [cast("Found", selected)]
        if selected is None:
            return [None] * len(self.inputs)
        names = [one.name for one in self.inputs]
        if not isinstance(selected, dict) or {*selected} != {*names}:
            raise TypeError(f"select_input and select_mask must return a dict with the keys {names}, got {selected!r}")
        return [selected[name] for name in names]


def _found_or_error(batch: Any, place: Place | None, argument: str) -> Tensor | TypeError | None:
    try:
        return find_tensor(batch, place, argument)
    except TypeError as error:
        return error


def _listed(names: Sequence[object]) -> str:
    return f"the input{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"


def _refuse_other_structure(places: list[Any], masks: list[Any]) -> None:
    """Raise if overridden methods have returned other objects than tensors, or another number of masks."""
    for method, found in (("select_input", places), ("select_mask", masks)):
        wrong = next((own for own in found if own is not None and not isinstance(own, Tensor)), None)
        if wrong is not None:
            raise TypeError(f"{method} must return a tensor, a list of tensors, or None, got a {type(wrong).__name__}")
    if len(masks) != len(places):
        raise TypeError(f"select_mask must return a mask for each place of the input, {len(places)}, got {len(masks)}")


def _refuse_shared_places(keys: Mapping[str, Key]) -> None:
    """Raise if two inputs have the same place in a batch."""
    owners: dict[object, str] = {}
    for name, key in keys.items():
        for place in places_in(key):
            path = None if place is None else path_of(place)
            if path in owners:
                raise ValueError(f"the inputs {owners[path]!r} and {name!r} are both at {place!r} of a batch")
            owners[path] = name
