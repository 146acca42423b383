"""`lightning-revbn compare`: did it help? A paired comparison of finished runs over the same seeds."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from lightning_revbn.cli.plot import PlotError, check_output, suffixes
from lightning_revbn.compare import (
    Alternative,
    PairedTTest,
    holm,
    least_detectable_effect,
    paired_t_test,
    wilcoxon_p_value,
)
from lightning_revbn.core.table import plain_table, rich_table
from lightning_revbn.runs.finished_runs import FinishedRun, check_pairs, read_finished
from lightning_revbn.runs.logs import find_logs, one_line, progress_bar

POWER = 0.8
FEWEST = 5
"""With fewer pairs Wilcoxon's test cannot reach p = 0.05, and the t-test leans on a spread that is hardly known."""
_SIGNS = {"greater": "proposed > baseline", "less": "proposed < baseline", "two-sided": "either direction"}


class CompareError(Exception):
    """Runs that cannot be compared as asked; the message is one line and says why."""


@dataclass(frozen=True)
class Comparison:
    """One proposed arm against the baseline.

    Args:
        label: What the arm is called.
        seeds: The pairs, shape `(n,)`.
        baseline: Scores of the baseline, shape `(n,)`.
        proposed: Scores of the same seeds, shape `(n,)`.
        test: The paired t-test.
        wilcoxon: p-value of Wilcoxon's signed-rank test.
        corrected: p-value of the t-test after Holm's correction for all arms.
    """

    label: str
    seeds: tuple[int, ...]
    baseline: tuple[float, ...]
    proposed: tuple[float, ...]
    test: PairedTTest
    wilcoxon: float
    corrected: float = math.nan


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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
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
    if arguments.output is not None:
        _draw(comparisons, arguments)
    if arguments.json:
        print(json.dumps(to_dict(comparisons, arguments.metric, arguments.alpha), indent=2))  # noqa: T201
        return 0
    header, rows = table(comparisons)
    title = f"{arguments.metric} of {len(baseline)} pairs, paired t-test: {_SIGNS[arguments.direction]}"
    if sys.stdout.isatty() and find_spec("rich") is not None:
        from rich.console import Console

        Console().print(rich_table(header, rows, title))
    else:
        print(plain_table(header, rows, title))  # noqa: T201
    for line in conclude(comparisons, arguments.alpha):
        print(line)  # noqa: T201
    return 0


def compare(
    baseline: Mapping[int, float], arms: Mapping[str, Mapping[int, float]], direction: Alternative
) -> list[Comparison]:
    """Test every arm against the baseline.

    Args:
        baseline: Scores by seed.
        arms: Scores by seed, of the same seeds, by label.
        direction: What is claimed.

    Returns:
        A comparison for each arm, corrected for their number.
    """
    seeds = tuple(baseline)
    before = tuple(baseline.values())
    found: list[Comparison] = []
    for label, scores in arms.items():
        after = tuple(scores[seed] for seed in seeds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of equal differences: `conclude` says it
            test = paired_t_test(after, before, alternative=direction)
        wilcoxon = wilcoxon_p_value(after, before, alternative=direction)
        found.append(Comparison(label, seeds, before, after, test, wilcoxon))
    corrected = holm([comparison.test.p_value for comparison in found])
    return [replace(comparison, corrected=p) for comparison, p in zip(found, corrected, strict=True)]


def table(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Return what is printed of the comparisons.

    Args:
        comparisons: All arms.

    Returns:
        The header, and a row for the baseline and each arm.
    """
    header = ["Arm", "n", "Mean", "std", "Difference", "95 % interval", "d_z", "p", "p (Wilcoxon)", "p (Holm)"]
    rows = [_cells("baseline", comparisons[0].baseline) + [""] * 6]
    for comparison in comparisons:
        test = comparison.test
        low, high = test.confidence_interval
        rows.append(
            [
                *_cells(comparison.label, comparison.proposed),
                f"{test.mean_difference:+.4g}",
                f"{low:+.4g} to {high:+.4g}",
                f"{test.effect_size:.2f}",
                f"{test.p_value:.3g}",
                f"{comparison.wilcoxon:.3g}",
                f"{comparison.corrected:.3g}",
            ]
        )
    if len(comparisons) == 1:  # one question needs no correction
        return header[:-1], [row[:-1] for row in rows]
    return header, rows


def conclude(comparisons: Sequence[Comparison], alpha: float) -> list[str]:
    """Say in words what the comparisons show, and what they cannot show.

    Args:
        comparisons: All arms.
        alpha: Level of the tests.

    Returns:
        Lines of text.
    """
    lines = [f"{one_line(comparison.label)}: {_verdict(comparison, alpha)}" for comparison in comparisons]
    test = comparisons[0].test
    effect = least_detectable_effect(test.n, level=alpha, power=POWER, alternative=test.alternative)
    spreads = ", ".join(f"{effect * comparison.test.std_difference:.3g}" for comparison in comparisons)
    lines.append(
        f"{test.n} pairs find an effect of d_z = {effect:.2f} in {POWER:.0%} of all experiments (here a difference of "
        f"{spreads}); smaller ones are often missed."
    )
    if test.n < FEWEST:
        lines.append(f"Warning: {test.n} pairs are too few to say anything. Run at least {FEWEST}, better 10 or more.")
    if len(comparisons) > 1:
        lines.append(
            f"p (Holm) corrects for {len(comparisons)} arms. It does not judge an arm that was chosen as the "
            "best here: choose on validation data."
        )
    return lines


def to_dict(comparisons: Sequence[Comparison], metric: str, alpha: float) -> dict[str, Any]:
    """Return everything as plain values, numbers that do not exist as None.

    Args:
        comparisons: All arms.
        metric: The key of the score.
        alpha: Level of the tests.

    Returns:
        What `--json` prints.
    """
    test = comparisons[0].test
    effect = least_detectable_effect(test.n, level=alpha, power=POWER, alternative=test.alternative)
    return {
        "metric": metric,
        "direction": test.alternative,
        "alpha": alpha,
        "n": test.n,
        "seeds": list(comparisons[0].seeds),
        "baseline": _summary(comparisons[0].baseline),
        "least_detectable_d_z": effect,
        "power": POWER,
        "too_few_pairs": test.n < FEWEST,
        "arms": [
            {
                "label": comparison.label,
                **_summary(comparison.proposed),
                "mean_difference": comparison.test.mean_difference,
                "std_difference": comparison.test.std_difference,
                "confidence_interval": [_known(bound) for bound in comparison.test.confidence_interval],
                "confidence_level": comparison.test.confidence_level,
                "effect_size": _known(comparison.test.effect_size),
                "statistic": _known(comparison.test.statistic),
                "p_value": _known(comparison.test.p_value),
                "wilcoxon_p_value": _known(comparison.wilcoxon),
                "holm_p_value": _known(comparison.corrected),
                "least_detectable_difference": effect * comparison.test.std_difference,
            }
            for comparison in comparisons
        ],
    }


def _summary(scores: Sequence[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(scores), "std": statistics.stdev(scores), "scores": list(scores)}


def _verdict(comparison: Comparison, alpha: float) -> str:
    test = comparison.test
    if math.isnan(test.p_value):
        return f"all differences are {test.mean_difference:+.4g}; a test can say nothing about equal differences"
    if comparison.corrected <= alpha:
        claim = {"greater": "higher than", "less": "lower than", "two-sided": "different from"}[test.alternative]
        return f"{claim} the baseline, p = {comparison.corrected:.3g}"
    against = test.alternative != "two-sided" and 1 - test.p_value <= alpha
    where = " The difference is clearly in the other direction." if against else ""
    return f"no effect in the declared direction shown, p = {comparison.corrected:.3g}.{where}"


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


def _cells(label: str, scores: Sequence[float]) -> list[str]:
    mean, std = statistics.fmean(scores), statistics.stdev(scores)
    return [one_line(label, 60), str(len(scores)), f"{mean:.5g}", f"{std:.3g}"]


def _draw(comparisons: Sequence[Comparison], arguments: argparse.Namespace) -> None:
    try:
        from lightning_revbn.plots import pairs_figure
    except ImportError as error:
        raise PlotError('figures need matplotlib: pip install "lightning-revbn[plots]"') from error
    arms = {comparison.label: comparison.proposed for comparison in comparisons}
    try:
        pairs_figure.save_pairs(comparisons[0].baseline, arms, arguments.metric, arguments.output)
    except OSError as error:
        raise PlotError(f"{one_line(arguments.output)} cannot be written: {error.strerror or error}") from error


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
