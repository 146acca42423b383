"""Compares settings between the ranks of a process group, through its key-value store and without a collective.

A rank that lacks the code would not call a collective, and all others would wait for it. In the store, the others see
that the settings of this rank are missing.
"""

# pyright: reportPrivateImportUsage=false
# torch.distributed is the documented home of Store, which it re-exports without saying so.

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeAlias, cast

import torch.distributed as dist

from lightning_revbn.core.torch_compat import default_store

__all__ = ["Parts", "RankSettings", "describe_differences"]

Parts: TypeAlias = Mapping[str, Mapping[str, Any]]
"""The settings of a rank, by the name of their owner and by their own names; plain values, as in JSON."""

_PATIENCE = timedelta(seconds=10)
"""How long a rank that has found a difference waits, so that the others find it too: rank 0 hosts the store."""


class RankSettings:
    """The settings of every rank, posted and compared once; ranks that agree make four requests each.

    Args:
        subject: The subject of the comparison. Every rank must make its comparisons of a subject in the same order.
        store: The store of the process group.
        rank: The number of this process in the group.
        ranks: How many processes the group has.
    """

    def __init__(self, subject: str, store: dist.Store, rank: int, ranks: int) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        subject = f"lightning_revbn/{subject}"
        # The store counts comparisons, so that no rank reads the entries of an earlier comparison.
        self._prefix = f"{subject}/{store.add(f'{subject}/{rank}', 1)}"
        self._same = ""

    @classmethod
    def open(cls, subject: str) -> RankSettings | None:
        """Begin a comparison between the ranks of the default process group.

        Args:
            subject: The subject of the comparison.

        Returns:
            The comparison; None with a single rank, or without a store.
        """
        store = default_store()
        if store is None or dist.get_world_size() == 1:
            return None
        return cls(subject, store, dist.get_rank(), dist.get_world_size())

    def post(self, parts: Parts) -> None:
        """Post the settings of this rank for the others.

        Args:
            parts: The settings.
        """
        # Settings may hold any object, which ranks compare by its repr.
        text = json.dumps(parts, default=repr)
        # Ranks count themselves under a hash of their settings, so ranks that agree read no settings of others.
        self._same = self._key("same", hashlib.sha256(text.encode()).hexdigest())
        self._store.set(self._key("posted", self._rank), text)
        self._store.add(self._same, 1)
        # The last rank to post releases the ranks that wait.
        if self._store.add(self._key("count"), 1) == self._ranks:
            self._store.set(self._key("complete"), "")

    def wait(self) -> None:
        """Wait until every rank has posted its settings, for at most the timeout of the process group."""
        with contextlib.suppress(RuntimeError):  # a FileStore raises nothing more specific
            self._store.wait([self._key("complete")])

    def differences(self) -> list[str]:
        """Compare the settings that ranks have posted up to now.

        Returns:
            The differences in words, with their ranks; empty if all ranks have posted the same.
        """
        if self._store.add(self._same, 0) == self._ranks:
            return []
        posted = [self._read(rank) for rank in range(self._ranks)]
        self._store.set(self._key("read", self._rank), "")
        readers = [self._key("read", rank) for rank, parts in enumerate(posted) if parts is not None]
        with contextlib.suppress(RuntimeError):  # a rank may have ended by now, and the store with it
            self._store.wait(readers, _PATIENCE)
        return describe_differences(posted)

    def _read(self, rank: int) -> Parts | None:
        key = self._key("posted", rank)
        return cast("Parts", json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _key(self, *parts: object) -> str:
        return "/".join([self._prefix, *map(str, parts)])


def describe_differences(posted: Sequence[Parts | None]) -> list[str]:
    """Describe the differences between ranks.

    Args:
        posted: The settings of every rank; None for a rank that has posted none.

    Returns:
        A text for every difference. A setting that some ranks do not name is compared among the others.

    Example:
        >>> describe_differences([{"Net": {"lr": 0.1}}, {"Net": {"lr": 0.1}}, {"Net": {"lr": 0.2}}, None])
        ['rank 3 has no Net, ranks 0-2 have', 'Net: lr=0.1 on ranks 0-1, lr=0.2 on rank 2']
    """
    found: list[str] = []
    names = dict.fromkeys(name for parts in posted if parts is not None for name in parts)
    for name in names:
        having = {rank: parts[name] for rank, parts in enumerate(posted) if parts is not None and name in parts}
        lacking = [rank for rank in range(len(posted)) if rank not in having]
        if lacking:
            ours, theirs = _ranks([*having]), _ranks(lacking)
            verbs = ["has" if len(ranks) == 1 else "have" for ranks in (lacking, having)]
            found.append(f"{theirs} {verbs[0]} no {name}, {ours} {verbs[1]}")
        for setting in dict.fromkeys(setting for settings in having.values() for setting in settings):
            by_value: dict[str, list[int]] = {}
            for rank, settings in having.items():
                if setting in settings:
                    by_value.setdefault(repr(settings[setting]), []).append(rank)
            if len(by_value) > 1:
                values = ", ".join(f"{setting}={value} on {_ranks(ranks)}" for value, ranks in by_value.items())
                found.append(f"{name}: {values}")
    return found


def _ranks(ranks: Sequence[int]) -> str:
    """Return the numbers of ranks in words, with a dash for consecutive numbers."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    named = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"
