"""Sorts runs into arms by the settings that the callback logged: a run without settings is a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_revbn.core.setting_keys import BASELINE_SETTINGS, SEED_KEY, SETTINGS_PREFIX
from lightning_revbn.runs.finished_runs import FinishedRun
from lightning_revbn.runs.names import natural, one_line
from lightning_revbn.runs.scalars import LogError

__all__ = ["Arm", "confounders", "sort_runs"]

_Settings: TypeAlias = tuple[tuple[str, Any], ...]

_ACTIVE = ("scale", "scale_lr_divisor", "shift_lr_multiplier", "eps", "weight_decay_exempt")
"""The settings that change training. The other settings choose the layers."""


@dataclass(frozen=True)
class Arm:
    """Runs of the same settings.

    Args:
        label: The settings in which the arms differ.
        runs: The runs.
    """

    label: str
    runs: tuple[FinishedRun, ...]


def sort_runs(runs: Sequence[FinishedRun]) -> list[Arm]:
    """Sort runs into arms.

    Args:
        runs: All runs.

    Returns:
        The baseline first, then the other arms in the order of their settings.

    Raises:
        LogError: If the baseline or every other arm is missing, or the settings of a run cannot be read.
    """
    unread = next((run.unread for run in runs if run.unread), "")
    if unread:
        raise LogError(f"{unread}: without its hyperparameters a run would be taken for a baseline")
    sorted_runs: dict[_Settings, list[FinishedRun]] = {}
    for run in runs:
        sorted_runs.setdefault(_settings(run.hyperparameters), []).append(run)
    baseline = sorted_runs.pop((), [])
    # A single arm differs from no other arm in any setting, and its label still needs the scale.
    names = [name for name in _names(sorted_runs) if name == "scale" or _differ(sorted_runs, name)]
    arms = {settings: _label(dict(settings), names) for settings in sorted_runs}
    ordered = sorted(arms, key=lambda settings: [_order(dict(settings).get(name)) for name in names])
    where = "name the arms by: compare BASELINE_LOGS --against LOGS"
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    if not arms:
        raise LogError(
            f"{count} and no settings of RevisitedBatchNorm in their hyperparameters, so there is nothing to compare "
            f"the baseline with; {where}"
        )
    if not baseline:
        found = ", ".join(arms[settings] for settings in ordered)
        raise LogError(
            f"{count} and no baseline among them: all were revisited ({one_line(found)}). Train without "
            f"RevisitedBatchNorm too, or {where}"
        )
    return [Arm("baseline", tuple(baseline)), *(Arm(arms[key], tuple(sorted_runs[key])) for key in ordered)]


def confounders(baseline: Mapping[int, FinishedRun], proposed: Mapping[int, FinishedRun]) -> list[str]:
    """Find the other differences between two arms, whose effects a comparison cannot tell apart.

    Args:
        baseline: Runs by seed.
        proposed: Runs of the same seeds.

    Returns:
        The names of the user's hyperparameters that differ within every pair.
    """
    differ = [
        {
            name
            for name in before.hyperparameters.keys() & proposed[seed].hyperparameters.keys()
            if before.hyperparameters[name] != proposed[seed].hyperparameters[name]
        }
        for seed, before in baseline.items()
    ]
    names = set[str].intersection(*differ) if differ else set[str]()
    # The arms differ in the callback's own settings by design.
    return sorted((name for name in names if not name.startswith((SETTINGS_PREFIX, "_"))), key=natural)


def _settings(hyperparameters: Mapping[str, Any]) -> _Settings:
    """Return the settings of a run, empty for a baseline; settings that were not logged get their neutral values."""
    logged = {
        name[len(SETTINGS_PREFIX) :]: value
        for name, value in hyperparameters.items()
        if name.startswith(SETTINGS_PREFIX) and name != SEED_KEY
    }
    if all(name not in logged or logged[name] == BASELINE_SETTINGS[name] for name in _ACTIVE):
        return ()
    # Older versions did not log every setting, and trained as the neutral values of the missing settings do.
    neutral = {name: BASELINE_SETTINGS[name] for name in _ACTIVE if name not in logged}
    return tuple(sorted({**logged, **neutral}.items()))


def _names(arms: Mapping[_Settings, object]) -> list[str]:
    known = dict.fromkeys(BASELINE_SETTINGS)
    found = dict.fromkeys(name for settings in arms for name, _ in settings)
    return [*(name for name in known if name in found), *(name for name in found if name not in known)]


def _differ(arms: Mapping[_Settings, object], name: str) -> bool:
    return len({dict(settings).get(name) for settings in arms}) > 1


def _label(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={_shown(settings.get(name))}" for name in names)


def _shown(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _order(value: object) -> tuple[int, float, str]:
    number = isinstance(value, (int, float))
    return (0, float(value), "") if number else (1, 0.0, str(value))  # pyright: ignore[reportArgumentType] # a number
