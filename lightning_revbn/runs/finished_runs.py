"""Reads the final score and the seed of every finished run below some directories."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_revbn.core.setting_keys import SEED_KEY
from lightning_revbn.runs.hydra_overrides import overridden_seeds
from lightning_revbn.runs.hyperparameters import read_hyperparameters
from lightning_revbn.runs.logs import Log, read_scalars
from lightning_revbn.runs.names import one_line
from lightning_revbn.runs.scalars import Advance, LogError, Scalars, Series

__all__ = ["FinishedRun", "Wanted", "by_seed", "check_pairs", "read_finished"]

_SEED_IN_PATH = re.compile(r"(?:^|[^a-z])seed[^0-9a-z]{0,2}([0-9]+)(?![0-9])", re.IGNORECASE)
_SEED_NAMES = ("seed", "seed_everything")
_GREATEST = 1e150
"""A test sums squares of scores; up to here the sums stay within float64."""


@dataclass(frozen=True)
class Wanted:
    """The values to read from every run.

    Args:
        metric: The key whose last value is the score; None reads no score.
        curve: The key of a scalar to read over all steps; None reads no curve.
        seed_pattern: A pattern whose first group finds the seed in a run's path; None searches the hyperparameters,
            the overrides of Hydra, then the path.
    """

    metric: str | None
    curve: str | None = None
    seed_pattern: re.Pattern[str] | None = None


@dataclass(frozen=True)
class FinishedRun:
    """The end of a run.

    Args:
        path: The path of the run's log.
        seed: The run's seed, or the number of its pair.
        score: The last value of the metric; NaN if no metric was asked for.
        last_step: The last step at which anything was logged.
        curve: The scalar over all steps, if a curve was asked for.
        hyperparameters: Single values by key.
        unread: The reason, if the hyperparameters could not be read.
        warnings: The parts of the log that were left out or could not be read.
    """

    path: Path
    seed: int
    score: float
    last_step: int
    curve: Series | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    unread: str = ""
    warnings: tuple[str, ...] = ()


def read_finished(logs: Sequence[Log], wanted: Wanted, advance: Advance) -> list[FinishedRun]:
    """Read runs to their ends.

    Args:
        logs: The logs of the runs.
        wanted: The values to read from each run.
        advance: Called with the number of bytes after every read.

    Returns:
        The runs, in the order of the logs.

    Raises:
        LogError: If a run has no score or no seed.
    """
    return [_read(log, wanted, advance) for log in logs]


def by_seed(runs: Sequence[FinishedRun]) -> dict[int, FinishedRun]:
    """Sort the runs of an arm.

    Args:
        runs: The runs.

    Returns:
        The runs by seed, in the order of the seeds.

    Raises:
        LogError: If a seed has two runs.
    """
    found: dict[int, FinishedRun] = {}
    for run in runs:
        if run.seed in found:
            other = found[run.seed]
            names = [
                name
                for name in {**other.hyperparameters, **run.hyperparameters}
                if other.hyperparameters.get(name) != run.hyperparameters.get(name)
            ]
            differ = f", which differ in {', '.join(map(one_line, names[:5]))}" if names else ""
            raise LogError(
                f"seed {run.seed} has two runs, {one_line(other.path)} and {one_line(run.path)}{differ}: "
                "name the run that counts"
            )
        found[run.seed] = run
    return {seed: found[seed] for seed in sorted(found)}


def check_pairs(
    baseline: Mapping[int, FinishedRun], proposed: Mapping[int, FinishedRun], label: str, any_length: bool
) -> None:
    """Refuse runs that cannot be compared pair by pair.

    Args:
        baseline: Runs by seed.
        proposed: Runs by seed.
        label: The name of the proposed arm.
        any_length: Whether runs may end at different steps.

    Raises:
        LogError: If a seed has a run on one side only, or a run is shorter than the longest run.
    """
    for side, other, missing in (("baseline", label, baseline), (label, "baseline", proposed)):
        alone = sorted({*baseline, *proposed} - {*missing})
        if alone:
            numbers = ", ".join(map(str, alone))
            raise LogError(f"seed{'s' * (len(alone) > 1)} {numbers} of {other} {_have(alone)} no partner in {side}")
    runs = [*baseline.values(), *proposed.values()]
    longest = max(run.last_step for run in runs)
    short = [run for run in runs if run.last_step < longest]
    if short and not any_length:
        raise LogError(
            f"{one_line(short[0].path)} ends at step {short[0].last_step:,}, the longest run at {longest:,}"
            f"{f' ({len(short) - 1} more are shorter)' if len(short) > 1 else ''}: is it unfinished? If runs stop "
            "by themselves, add --any-length"
        )


def _have(seeds: Sequence[int]) -> str:
    return "have" if len(seeds) > 1 else "has"


def _read(log: Log, wanted: Wanted, advance: Advance) -> FinishedRun:
    scalars = read_scalars(log, advance)
    score, curve = math.nan, None
    if wanted.curve is not None:
        curve = _series(log, scalars, wanted.curve)
    if wanted.metric is not None:
        score = float(_series(log, scalars, wanted.metric).values[-1])
        if abs(score) > _GREATEST and math.isfinite(score):
            raise LogError(
                f"{one_line(log.path)} ends with {wanted.metric}={score:g}: too large to compare, a run that diverged"
            )
        if not math.isfinite(score):
            raise LogError(
                f"{one_line(log.path)} ends with {wanted.metric}={score}: a run that failed has no score to compare"
            )
    try:
        hyperparameters, unread = read_hyperparameters(log), ""
    except LogError as error:
        hyperparameters, unread = dict[str, Any](), str(error)
    seed = _seed(log.path, wanted.seed_pattern, hyperparameters, unread)
    return FinishedRun(log.path, seed, score, scalars.last_step, curve, hyperparameters, unread, scalars.warnings)


def _series(log: Log, scalars: Scalars, key: str) -> Series:
    if key not in scalars.series:
        near = sorted(name for name in scalars.series if name.rpartition("/")[2].startswith(key[:3]))[:5]
        hint = f"; it has {', '.join(map(one_line, near))}" if near else ""
        raise LogError(f"{one_line(log.path)} has no {one_line(key)}: unfinished, or logged by another name{hint}")
    return scalars.series[key]


def _seed(path: Path, seed_pattern: re.Pattern[str] | None, hyperparameters: Mapping[str, Any], unread: str) -> int:
    if seed_pattern is not None:
        return _seed_by_pattern(path, seed_pattern)
    groups: list[list[Any]] = [
        [hyperparameters.get(name) for name in _SEED_NAMES],
        # A script may derive the seed of `seed_everything`, and a baseline without a callback logs none.
        [*overridden_seeds(path, _SEED_NAMES)],
        [hyperparameters.get(SEED_KEY)],
        [value for name, value in hyperparameters.items() if name.rpartition("/")[2] in _SEED_NAMES],
    ]
    for group in groups:
        # Two different seeds in a group leave open which seed the run had.
        seeds = {str(value) for value in group if isinstance(value, (int, str)) and str(value).isdecimal()}
        if len(seeds) == 1:
            return _number(seeds.pop(), path)
    for part in reversed(path.absolute().parts):  # the directory nearest to the run decides
        match = _SEED_IN_PATH.search(part)
        if match is not None:
            return _number(match[1], path)
    raise LogError(
        f"the seed of {one_line(path)} is not known: its hparams.yaml has no 'seed: N', and its path has no "
        rf"'seed_N'. Name it by --seed-pattern, such as 'run_(\d+)'{f' ({unread})' if unread else ''}; in further runs "
        "BatchNormMonitor() logs the seed of seed_everything, in a baseline too"
    )


def _seed_by_pattern(path: Path, seed_pattern: re.Pattern[str]) -> int:
    quoted = repr(one_line(seed_pattern.pattern, 100))
    match = seed_pattern.search(str(path))
    if match is None:
        raise LogError(f"--seed-pattern {quoted} finds nothing in {one_line(path)}")
    try:
        return int(match[1])
    except (TypeError, ValueError) as error:  # the group is optional and empty, or has too many digits
        found = one_line(match[1] or "nothing", 60)
        raise LogError(f"--seed-pattern {quoted} finds no number in {one_line(path)}: {found}") from error


def _number(digits: str, where: Path) -> int:
    try:
        return int(digits)
    except ValueError as error:  # Python refuses numbers of more than 4,300 digits
        many = f"{len(digits):,} digits"
        raise LogError(f"the seed in {one_line(where)} has {many}: name it by --seed-pattern") from error
