"""`lightning-revbn compare`: did it help? A paired comparison of finished runs over the same seeds."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from lightning_revbn.cli.figure_file import check_output, matplotlib_needed, save_figure
from lightning_revbn.cli.seed_pattern import check_time, parse_seed_pattern
from lightning_revbn.cli.terminal import CommandError, print_json, progress_bar, say, show_table, tell
from lightning_revbn.compare import Alternative
from lightning_revbn.runs import curves
from lightning_revbn.runs.arms import confounders, sort_runs
from lightning_revbn.runs.comparison import POWER, Comparison, compare, conclude, note, table, to_dict
from lightning_revbn.runs.finished_runs import FinishedRun, Wanted, by_seed, check_pairs, read_finished
from lightning_revbn.runs.logs import Log, find_logs
from lightning_revbn.runs.names import one_line, suffixes

__all__ = ["CompareError", "add_parser"]

_BASELINE = "baseline"
"""What the first arm is called in tables and figures, and no other."""
_MOST_WARNINGS = 5
_MOST_ARMS = 24  # in a figure; readers cannot tell more arms apart
_SIGNS = {"greater": "proposed > baseline", "less": "proposed < baseline", "two-sided": "either direction"}


class CompareError(CommandError):
    """Runs cannot be compared as asked; the message gives the reason in a single line."""


def add_parser(commands: Any) -> None:
    """Add the command to a parser.

    Args:
        commands: The result of `add_subparsers`.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="compare finished runs with a baseline, seed by seed",
        description="Pair finished runs with baseline runs of the same seed, from the logs of CSVLogger, "
        "TensorBoardLogger, WandbLogger (offline) or MLFlowLogger (a local store), and test whether they score higher: "
        "a paired t-test in a direction that is declared, "
        "Wilcoxon's test beside it, Holm's correction where several arms are compared, and the least effect that so "
        "many pairs can show.",
    )
    parser.add_argument(
        "baseline",
        nargs="+",
        type=Path,
        metavar="LOGS",
        help="runs, or a directory above several: the baseline's; without --against those of all arms, which the "
        "settings that RevisitedBatchNorm logged tell apart (none: baseline)",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        action="append",
        metavar="LOGS",
        help="the runs of one proposed arm; give it again for another, such as another scale",
    )
    parser.add_argument("--metric", metavar="KEY", help="the score, such as test_acc: its last value")
    parser.add_argument(
        "--direction",
        choices=get_args(Alternative),
        default="greater",
        help="what is claimed of the proposed runs, before looking at them; 'less' for a loss (default: %(default)s)",
    )
    parser.add_argument("--alpha", type=float, default=0.05, metavar="P", help="level of the tests (default: 0.05)")
    parser.add_argument(
        "--labels", nargs="+", metavar="NAME", help="what to call the arms (default: their paths' ends)"
    )
    parser.add_argument(
        "--seed-pattern",
        metavar="REGEX",
        help=r"finds a run's seed in its path, such as 'run_(\d+)' (default: 'seed' among its hyperparameters or "
        "Hydra's overrides, else the seed of seed_everything that the callback logged, else seed_N in its path)",
    )
    parser.add_argument("--any-length", action="store_true", help="allow runs that end at different steps")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="draw the pairs, or the curves: a .png, .svg or .pdf file"
    )
    _add_curves(parser)
    parser.set_defaults(run=_run)


def _add_curves(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--curves",
        metavar="KEY",
        help="draw this scalar over training into FILE, with the step from which an arm is ahead for good, such as "
        "val_loss",
    )
    parser.add_argument(
        "--curves-direction",
        choices=("greater", "less"),
        help="which side of the baseline is ahead (default: less if the key of --curves has loss or err in it)",
    )


def _run(arguments: argparse.Namespace) -> int:
    """Compare the runs and print the result.

    Args:
        arguments: The command line.

    Returns:
        The exit code: 0, whatever the result is.

    Raises:
        CompareError: If an option is wrong, or the runs cannot be compared.
        PlotError: If the figure cannot be written.
    """
    _check(arguments)
    arms = _read_arms(arguments)
    baseline, proposed = arms[0][1], dict(arms[1:])
    if arguments.output is not None and len(proposed) > _MOST_ARMS:
        raise CompareError(
            f"{len(proposed)} arms were found, and a figure shows no more than {_MOST_ARMS}: name the runs of fewer"
        )
    for label, runs in proposed.items():
        check_pairs(baseline, runs, label, arguments.any_length)
    if len(baseline) < 2:
        raise CompareError("a single pair tells nothing about chance: run more seeds")
    if find_spec("scipy") is None:
        raise CompareError('comparing needs scipy: pip install "lightning-revbn[compare]"')
    _tell_damage([run for _, runs in arms for run in runs.values()])
    for label, runs in proposed.items():
        others = confounders(baseline, runs)
        if others:
            names = ", ".join(map(one_line, others[:5])) + (", ..." if len(others) > 5 else "")
            tell(f"{one_line(label)} and the baseline differ in other hyperparameters too: {names}")
    if arguments.metric is not None:
        _compare_scores(baseline, proposed, arguments)
    if arguments.curves is not None:
        _compare_curves(baseline, proposed, arguments)
    return 0


def _tell_damage(runs: Sequence[FinishedRun]) -> None:
    """Report the parts of the logs that were left out: without them, a score may not be the run's last value."""
    warnings = [warning for run in runs for warning in run.warnings]
    for warning in warnings[:_MOST_WARNINGS]:
        tell(warning)
    if len(warnings) > _MOST_WARNINGS:
        tell(f"more warnings of damaged logs: {len(warnings) - _MOST_WARNINGS}")


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that cannot be followed, before any log is read."""
    if not 0 < arguments.alpha < POWER:  # without any effect, a test has a power of alpha
        raise CompareError(f"--alpha {arguments.alpha} must be above 0 and below {POWER}")
    if arguments.metric is None and arguments.curves is None:
        raise CompareError("name what to compare: --metric KEY, such as test_acc, or --curves KEY, such as val_loss")
    if arguments.curves is not None and arguments.output is None:
        raise CompareError("--curves draws into a file: name it by -o, such as -o curves.png")
    if arguments.metric is None and arguments.json:
        raise CompareError("--json prints the comparison of scores: name the score by --metric")
    if arguments.output is not None:
        check_output(arguments.output)


def _compare_scores(
    baseline: dict[int, FinishedRun], proposed: dict[str, dict[int, FinishedRun]], arguments: argparse.Namespace
) -> None:
    scores = {label: {seed: run.score for seed, run in runs.items()} for label, runs in proposed.items()}
    before = {seed: run.score for seed, run in baseline.items()}
    comparisons = compare(before, scores, arguments.direction)
    try:
        conclusions = conclude(comparisons, arguments.alpha)
    except ValueError as error:
        raise CompareError(f"--alpha {arguments.alpha}: {error}") from error
    if arguments.output is not None and arguments.curves is None:
        _draw(comparisons, arguments)
    if arguments.json:
        print_json(to_dict(comparisons, arguments.metric, arguments.alpha))
        return
    header, rows = table(comparisons)
    title = f"{arguments.metric} of {len(baseline)} pairs, paired t-test: {_SIGNS[arguments.direction]}"
    show_table(header, rows, title)
    for line in conclusions:
        say(line)


def _compare_curves(
    baseline: dict[int, FinishedRun], proposed: dict[str, dict[int, FinishedRun]], arguments: argparse.Namespace
) -> None:
    with matplotlib_needed():
        from lightning_revbn.plots import curves_figure
    key: str = arguments.curves
    lower_is_better = _lower_is_better(arguments)
    comparisons = [curves.compare_curves(baseline, runs, label, key) for label, runs in proposed.items()]
    save_figure(curves_figure.draw(comparisons, key, lower_is_better), arguments.output)
    if not arguments.json:  # stdout holds the JSON alone
        for comparison in comparisons:
            say(curves.conclude(comparison, key, lower_is_better))


def _lower_is_better(arguments: argparse.Namespace) -> bool:
    if arguments.curves_direction is not None:
        return arguments.curves_direction == "less"
    # --direction has already told which side of this key is better.
    if arguments.curves == arguments.metric and arguments.direction != "two-sided":
        return arguments.direction == "less"
    return any(word in arguments.curves.lower() for word in ("loss", "err"))


def _labels(arguments: argparse.Namespace, found: Sequence[str]) -> list[str]:
    """Return the names of the proposed arms: the user's labels, or the labels that were found."""
    labels = list(arguments.labels or found)
    if len(labels) != len(found):
        raise CompareError(f"--labels has {len(labels)} names for {len(found)} arms ({_named(arguments, found)})")
    names = [_BASELINE, *labels]
    if len(set(names)) < len(names):
        raise CompareError(f"two arms are called {one_line(max(names, key=names.count))}: name them by --labels")
    return labels


def _ends(arms: Sequence[Sequence[Path]]) -> list[str]:
    """Name arms by the ends of their directories; a directory called baseline gets its parent's name too."""
    directories = [Path(os.path.commonpath([path.absolute() for path in arm])) for arm in arms]
    ends = suffixes(directories)
    return [
        "/".join(directory.parts[-2:]) if end == _BASELINE else end
        for end, directory in zip(ends, directories, strict=True)
    ]


def _named(arguments: argparse.Namespace, found: Sequence[str]) -> str:
    return "--against" if arguments.against else one_line("; ".join(found))


def _read_arms(arguments: argparse.Namespace) -> list[tuple[str, dict[int, FinishedRun]]]:
    """Return the baseline and the proposed arms, each with its label."""
    pattern = None if arguments.seed_pattern is None else parse_seed_pattern(arguments.seed_pattern)
    wanted = Wanted(arguments.metric, arguments.curves, pattern)
    paths: list[list[Path]] = arguments.against or []
    logs = [find_logs(arm) for arm in (arguments.baseline, *paths)]
    if pattern is not None:
        check_time(pattern, [log.path for arm in logs for log in arm])
    labels = _labels(arguments, _ends(paths)) if paths else []
    sorted_runs = _read(logs, wanted)
    if not paths:
        arms = sort_runs(sorted_runs[0])
        labels = _labels(arguments, [arm.label for arm in arms[1:]])
        sorted_runs = [arm.runs for arm in arms]
    return [(label, by_seed(runs)) for label, runs in zip([_BASELINE, *labels], sorted_runs, strict=True)]


def _read(arms: Sequence[Sequence[Log]], wanted: Wanted) -> list[list[FinishedRun]]:
    with progress_bar("Reading logs", sum(log.size for arm in arms for log in arm)) as advance:
        return [read_finished(arm, wanted, advance) for arm in arms]


def _draw(comparisons: Sequence[Comparison], arguments: argparse.Namespace) -> None:
    with matplotlib_needed():
        from lightning_revbn.plots import pairs_figure
    arms = {comparison.label: comparison.proposed for comparison in comparisons}
    notes = {comparison.label: note(comparison, len(comparisons) > 1) for comparison in comparisons}
    save_figure(pairs_figure.draw(comparisons[0].baseline, arms, arguments.metric, notes), arguments.output)
