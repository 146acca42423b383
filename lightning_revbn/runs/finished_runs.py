"""Reads the final score and the seed of every finished run below some directories."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_revbn.runs.logs import Log, read_scalars
from lightning_revbn.runs.names import one_line
from lightning_revbn.runs.scalars import Advance, LogError

__all__ = ["FinishedRun", "check_pairs", "read_finished"]

_SEED_IN_PATH = re.compile(r"(?:^|[^a-z])seed[^0-9a-z]{0,2}([0-9]+)(?![0-9])", re.IGNORECASE)
_SEED_IN_YAML = re.compile(r"^\s*(?:seed|seed_everything):\s*([0-9]+)\s*$", re.MULTILINE)
_SETTINGS = ("hparams.yaml", "config.yaml")
_GREATEST = 1e150
"""Scores up to here have squares, whose sums a test takes."""


@dataclass(frozen=True)
class FinishedRun:
    """The end of one run.

    Args:
        path: Where its log is.
        seed: Its seed, or the number of its pair.
        score: The last value of the metric.
        last_step: The last step at which anything was logged.
    """

    path: Path
    seed: int
    score: float
    last_step: int


def read_finished(
    logs: Sequence[Log], metric: str, seed_pattern: re.Pattern[str] | None, advance: Advance
) -> dict[int, FinishedRun]:
    """Read the runs of one arm.

    Args:
        logs: Where the runs are.
        metric: The key of the score.
        seed_pattern: Finds the seed in a run's path, as its first group; None looks into hparams.yaml and config.yaml
            beside the log, then into the path.
        advance: Called with the number of bytes whenever some were read.

    Returns:
        The runs by seed, ascending.

    Raises:
        LogError: If a run cannot be read, has no finite score or no seed, or a seed has two runs.
    """
    found: dict[int, FinishedRun] = {}
    for log in logs:
        run = _read(log, metric, seed_pattern, advance)
        if run.seed in found:
            raise LogError(
                f"seed {run.seed} has two runs, {one_line(found[run.seed].path)} and {one_line(run.path)}: "
                "name the one that counts"
            )
        found[run.seed] = run
    return {seed: found[seed] for seed in sorted(found)}


def check_pairs(
    baseline: Mapping[int, FinishedRun], proposed: Mapping[int, FinishedRun], label: str, any_length: bool
) -> None:
    """Refuse what is no pair by pair comparison of finished runs.

    Args:
        baseline: Runs by seed.
        proposed: Runs by seed.
        label: What the proposed arm is called.
        any_length: Whether runs may end at different steps.

    Raises:
        LogError: If a seed is on one side only, or a run is shorter than the longest.
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
            f"{f' ({len(short) - 1} more are shorter)' if len(short) > 1 else ''}: unfinished? Where runs stop by "
            "themselves, say --any-length"
        )


def _have(seeds: Sequence[int]) -> str:
    return "have" if len(seeds) > 1 else "has"


def _read(log: Log, metric: str, seed_pattern: re.Pattern[str] | None, advance: Advance) -> FinishedRun:
    series = read_scalars(log, advance).series
    if metric not in series:
        near = sorted(key for key in series if key.rpartition("/")[2].startswith(metric[:3]))[:5]
        hint = f"; it has {', '.join(map(one_line, near))}" if near else ""
        raise LogError(f"{one_line(log.path)} has no {metric}: unfinished, or logged by another name{hint}")
    score = float(series[metric].values[-1])
    if abs(score) > _GREATEST and math.isfinite(score):
        raise LogError(f"{one_line(log.path)} ends with {metric}={score:g}: too large to compare, a run that diverged")
    if not math.isfinite(score):
        raise LogError(f"{one_line(log.path)} ends with {metric}={score}: a run that failed has no score to compare")
    last_step = max(int(one.steps[-1]) for one in series.values() if len(one.steps))
    return FinishedRun(log.path, _seed(log.path, seed_pattern), score, last_step)


def _seed(path: Path, seed_pattern: re.Pattern[str] | None) -> int:
    if seed_pattern is not None:
        match = seed_pattern.search(str(path))
        if match is None:
            raise LogError(f"--seed-pattern {seed_pattern.pattern!r} finds nothing in {one_line(path)}")
        try:
            return int(match[1])
        except (TypeError, ValueError) as error:  # an optional group that matches nothing, or too many digits
            raise LogError(
                f"--seed-pattern {seed_pattern.pattern!r} finds no number in {one_line(path)}: "
                f"{one_line(match[1] or 'nothing', 60)}"
            ) from error
    directory = path if path.is_dir() else path.parent
    for name in _SETTINGS:
        file = directory / name
        seeds = set(_SEED_IN_YAML.findall(file.read_text(errors="replace"))) if file.is_file() else set[str]()
        if len(seeds) == 1:
            return _number(seeds.pop(), file)
    for part in reversed(path.absolute().parts):
        match = _SEED_IN_PATH.search(part)
        if match is not None:
            return _number(match[1], path)
    raise LogError(
        f"the seed of {one_line(path)} is not known: there is no 'seed: N' in its hparams.yaml and no 'seed_N' in its "
        r"path; name it by --seed-pattern, such as 'run_(\d+)'"
    )


def _number(digits: str, where: Path) -> int:
    try:
        return int(digits)
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        many = f"{len(digits):,} digits"
        raise LogError(f"the seed in {one_line(where)} has {many}: name it by --seed-pattern") from error
