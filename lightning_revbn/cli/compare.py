"""`lightning-revbn compare`: did it help? A paired comparison of finished runs over the same seeds."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from lightning_revbn.cli.figure_file import check_output, matplotlib_needed, save_figure
from lightning_revbn.cli.terminal import CommandError, print_json, progress_bar, say, show_table
from lightning_revbn.compare import Alternative
from lightning_revbn.runs.comparison import POWER, Comparison, compare, conclude, table, to_dict
from lightning_revbn.runs.finished_runs import FinishedRun, check_pairs, read_finished
from lightning_revbn.runs.logs import find_logs
from lightning_revbn.runs.names import one_line, suffixes

__all__ = ["CompareError", "add_parser"]

_SIGNS = {"greater": "proposed > baseline", "less": "proposed < baseline", "two-sided": "either direction"}


class CompareError(CommandError):
    """Runs that cannot be compared as asked; the message is one line and says why."""


def add_parser(commands: Any) -> None:
    """Add the command to a parser.

    Args:
        commands: What `add_subparsers` returned.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="compare finished runs with a baseline, seed by seed",
        description="Pair finished runs with baseline runs of the same seed, from the logs of CSVLogger or "
        "TensorBoardLogger, and test whether they score higher: a paired t-test in a direction that is declared, "
        "Wilcoxon's test beside it, Holm's correction where several arms are compared, and the least effect that so "
        "many pairs can show.",
    )
    parser.add_argument(
        "baseline", nargs="+", type=Path, metavar="BASELINE_LOGS", help="runs, or a directory above several"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        action="append",
        required=True,
        metavar="LOGS",
        help="the runs of one proposed arm; give it again for another, such as another scale",
    )
    parser.add_argument("--metric", required=True, metavar="KEY", help="the score, such as test_acc: its last value")
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
        help=r"finds a run's seed in its path, such as 'run_(\d+)' (default: 'seed: N' in its hparams.yaml or "
        "config.yaml, else seed_N in its path)",
    )
    parser.add_argument("--any-length", action="store_true", help="allow runs that end at different steps")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="draw the pairs: a .png, .svg or .pdf file")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Compare the runs and print what came of it.

    Args:
        arguments: The command line.

    Returns:
        The exit code: 0, whatever the answer is.

    Raises:
        CompareError: If an option is wrong, or the runs cannot be compared.
        PlotError: If the figure cannot be written.
    """
    if not 0 < arguments.alpha < POWER:
        raise CompareError(f"--alpha {arguments.alpha} must be above 0 and below {POWER}")
    if arguments.output is not None:
        check_output(arguments.output)
    labels = _labels(arguments)
    arms = _read_arms(arguments)
    baseline, *proposed = arms
    for label, runs in zip(labels, proposed, strict=True):
        check_pairs(baseline, runs, label, arguments.any_length)
    if len(baseline) < 2:
        raise CompareError("one pair tells nothing about chance: run more seeds")
    if find_spec("scipy") is None:
        raise CompareError('comparing needs scipy: pip install "lightning-revbn[compare]"')
    before, *after = ({seed: run.score for seed, run in runs.items()} for runs in arms)
    comparisons = compare(before, dict(zip(labels, after, strict=True)), arguments.direction)
    try:
        conclusions = conclude(comparisons, arguments.alpha)
    except ValueError as error:
        raise CompareError(f"--alpha {arguments.alpha}: {error}") from error
    if arguments.output is not None:
        _draw(comparisons, arguments)
    if arguments.json:
        print_json(to_dict(comparisons, arguments.metric, arguments.alpha))
        return 0
    header, rows = table(comparisons)
    title = f"{arguments.metric} of {len(baseline)} pairs, paired t-test: {_SIGNS[arguments.direction]}"
    show_table(header, rows, title)
    for line in conclusions:
        say(line)
    return 0


def _labels(arguments: argparse.Namespace) -> list[str]:
    arms: list[list[Path]] = arguments.against
    if arguments.labels:
        if len(arguments.labels) != len(arms):
            raise CompareError(f"--labels has {len(arguments.labels)} names for {len(arms)} arms (--against)")
        labels = list(arguments.labels)
    else:
        shared = [Path(os.path.commonpath([path.absolute() for path in paths])) for paths in arms]
        labels = suffixes(shared)
    if len(set(labels)) < len(labels):
        raise CompareError(f"two arms are called {one_line(max(labels, key=labels.count))}: name them by --labels")
    return labels


def _seed_pattern(text: str | None) -> re.Pattern[str] | None:
    if text is None:
        return None
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise CompareError(f"--seed-pattern {one_line(text)} is no regular expression: {error}") from error
    if pattern.groups < 1:
        raise CompareError(f"--seed-pattern {one_line(text)} must have a group, such as 'run_(\\d+)'")
    return pattern


def _read_arms(arguments: argparse.Namespace) -> list[dict[int, FinishedRun]]:
    pattern = _seed_pattern(arguments.seed_pattern)
    arms: list[list[Path]] = [arguments.baseline, *arguments.against]
    logs = [find_logs(paths) for paths in arms]
    with progress_bar("Reading logs", sum(log.size for arm in logs for log in arm)) as advance:
        return [read_finished(arm, arguments.metric, pattern, advance) for arm in logs]


def _draw(comparisons: Sequence[Comparison], arguments: argparse.Namespace) -> None:
    with matplotlib_needed():
        from lightning_revbn.plots import pairs_figure
    arms = {comparison.label: comparison.proposed for comparison in comparisons}
    save_figure(pairs_figure.draw(comparisons[0].baseline, arms, arguments.metric), arguments.output)
