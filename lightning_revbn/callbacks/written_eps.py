"""Writes eps into a module's layers, and notes on each layer the written eps and the eps from the model's code.

A note is an attribute of the layer, as eps is, so copies and pickles of a model keep it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

from torch import nn

from lightning_revbn.core.eps import layers_with_eps, write_eps
from lightning_revbn.core.layers import eps_of

__all__ = ["Note", "WrittenEps", "note_of"]

_NOTE = "_revbn_eps"


class Note(NamedTuple):
    """A layer's eps from the model's code, and the eps that a callback wrote."""

    code: float | None
    eps: float | None


def note_of(layer: nn.Module) -> Note | None:
    """Return the note on a layer.

    Args:
        layer: The layer.

    Returns:
        The note; None if no callback has written the layer's eps, or if other code has set it since.
    """
    note = cast("tuple[float | None, float | None] | None", vars(layer).get(_NOTE))
    return Note(*note) if note is not None and note[1] == eps_of(layer) else None


def _put_note(layer: nn.Module, note: Note | None) -> None:
    vars(layer).pop(_NOTE, None)
    if note is not None:
        # A plain tuple, since a pickle of the model must load where this package is not installed.
        vars(layer)[_NOTE] = tuple(note)


class WrittenEps:
    """The eps of a module's layers and of their copies, with the values to undo each write.

    Args:
        module: The module; a weak reference does not keep it alive.

    Attributes:
        before: The eps from the model's code by name, for layers whose eps was set here.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._notes = self.notes()
        self._undo: dict[str, tuple[float | None, Note | None]] = {}
        self._copies: dict[nn.Module, str] = {}
        self.before: dict[str, float | None] = {}

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Every module with an eps, by dotted name; empty once the module is gone."""
        module = self._module()
        return {} if module is None else layers_with_eps(module)

    def notes(self) -> dict[str, Note]:
        """Return the notes on layers, by name."""
        notes = {name: note_of(layer) for name, layer in self.layers.items()}
        return {name: note for name, note in notes.items() if note is not None}

    def code(self) -> dict[str, float | None]:
        """Return the eps that the model's code, or a user by hand, gives the layers, by name."""
        return {name: _eps_of_code(layer) for name, layer in self.layers.items()}

    def undone_by(self) -> set[str]:
        """Return the names of the layers that `give_back` changes."""
        return set(self._undo)

    def set(self, values: Mapping[str, float], *, stays: bool = False) -> None:
        """Set eps, and note the eps from the model's code.

        Args:
            values: eps by name.
            stays: Whether `give_back` leaves the new eps.
        """
        code = self.code()
        self._write(values, {name: Note(code[name], eps) for name, eps in values.items()}, stays)

    def leave_to_code(self, names: Iterable[str], *, stays: bool = False) -> None:
        """Give layers the eps from the model's code.

        Args:
            names: The names of the layers.
            stays: Whether `give_back` leaves the new eps.
        """
        code = self.code()
        self._write({name: code[name] for name in names}, {}, stays)

    def give_back(self) -> None:
        """Undo the changes, except those that stay."""
        layers = self.layers
        undo = {name: had for name, had in self._undo.items() if name in layers}
        self._write({name: eps for name, (eps, _) in undo.items()}, {name: note for name, (_, note) in undo.items()})
        self._undo, self.before = {}, {}

    def follow(self, copies: Mapping[nn.Module, str]) -> None:
        """From the next write on, give copies of layers the eps of their originals.

        Args:
            copies: The names of the originals by copy.
        """
        self._copies |= copies

    def note_again(self) -> None:
        """Put notes on converted layers: conversion to SyncBatchNorm and back copies eps without the note."""
        for name, layer in self.layers.items():
            note = self._notes.get(name)
            if note is not None and note_of(layer) is None and eps_of(layer) == note.eps:
                _put_note(layer, note)

    def end(self) -> None:
        """Renew the notes, and release the copies."""
        self.note_again()
        self._copies = {}

    def _write(self, values: Mapping[str, float | None], notes: Mapping[str, Note | None], stays: bool = False) -> None:
        layers = self.layers
        had = {name: (eps_of(layers[name]), note_of(layers[name])) for name in values}
        code = {name: _eps_of_code(layers[name]) for name in values}
        module = self._module()
        if module is not None:
            write_eps(module, values)
        for name in values:
            _put_note(layers[name], notes.get(name))
        for copy, name in self._copies.items():
            if name in layers:
                write_eps(copy, {"": eps_of(layers[name])})
                _put_note(copy, note_of(layers[name]))
        self._notes = self.notes()
        # Of several writes, undo restores the value from before the first.
        kept = {name: old for name, old in self._undo.items() if not (stays and name in values)}
        self._undo = kept if stays else {**had, **kept}
        self.before = {name: old for name, old in (self.before | code).items() if name in self._notes}


def _eps_of_code(layer: nn.Module) -> float | None:
    note = note_of(layer)
    return eps_of(layer) if note is None else note.code
