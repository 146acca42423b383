"""Compares arms with a baseline over the same seeds: tests them, and describes the results and their limits."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_revbn.compare import (
    Alternative,
    PairedTTest,
    holm,
    least_detectable_effect,
    paired_t_test,
    wilcoxon_p_value,
)

__all__ = ["POWER", "Comparison", "compare", "conclude", "note", "table", "to_dict"]

POWER = 0.8
"""Share of experiments in which a test finds the least detectable effect."""

_FEWEST = 5
"""With fewer pairs Wilcoxon's test cannot reach p = 0.05, and the t-test rests on a poor estimate of the spread."""


@dataclass(frozen=True)
class Comparison:
    """A proposed arm against the baseline.

    Args:
        label: The name of the arm.
        seeds: The seed of each pair, shape `(n,)`.
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


def compare(
    baseline: Mapping[int, float], arms: Mapping[str, Mapping[int, float]], direction: Alternative
) -> list[Comparison]:
    """Test every arm against the baseline.

    Args:
        baseline: Scores by seed.
        arms: Scores of the same seeds by seed, for each arm's label.
        direction: The claim that is tested.

    Returns:
        A comparison for each arm, corrected for the number of arms.
    """
    seeds = tuple(baseline)
    before = tuple(baseline.values())
    found: list[Comparison] = []
    for label, scores in arms.items():
        after = tuple(scores[seed] for seed in seeds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # equal differences: `conclude` reports them
            test = paired_t_test(after, before, alternative=direction)
        wilcoxon = wilcoxon_p_value(after, before, alternative=direction)
        found.append(Comparison(label, seeds, before, after, test, wilcoxon))
    corrected = holm([comparison.test.p_value for comparison in found])
    return [replace(comparison, corrected=p) for comparison, p in zip(found, corrected, strict=True)]


def table(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Return the table of the comparisons as text.

    Args:
        comparisons: All arms.

    Returns:
        The header, and a row for the baseline and for each arm.
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
    if len(comparisons) == 1:  # a single test needs no correction
        return header[:-1], [row[:-1] for row in rows]
    return header, rows


def conclude(comparisons: Sequence[Comparison], alpha: float) -> list[str]:
    """Describe the results of the comparisons, and the smallest effect that they can detect.

    Args:
        comparisons: All arms.
        alpha: Level of the tests.

    Returns:
        Lines of text.
    """
    lines = [f"{comparison.label}: {_verdict(comparison, alpha)}" for comparison in comparisons]
    test = comparisons[0].test
    effect = least_detectable_effect(test.n, level=alpha, power=POWER, alternative=test.alternative)
    spreads = ", ".join(f"{effect * comparison.test.std_difference:.3g}" for comparison in comparisons)
    lines.append(
        f"{test.n} pairs find an effect of d_z = {effect:.2f} in {POWER:.0%} of all experiments (here a difference of "
        f"{spreads}); smaller ones are often missed."
    )
    if test.n < _FEWEST:
        lines.append(f"Warning: {test.n} pairs are too few to say anything. Run at least {_FEWEST}, better 10 or more.")
    if len(comparisons) > 1:
        lines.append(
            f"p (Holm) corrects for {len(comparisons)} arms. It does not judge an arm that was chosen as the "
            "best here: choose on validation data."
        )
    return lines


def note(comparison: Comparison, is_corrected: bool) -> str:
    """Write the note beside an arm's pairs in a figure.

    Args:
        comparison: The arm.
        is_corrected: Whether p is corrected for several arms.

    Returns:
        Two lines: the difference with its interval; the number of pairs and the p-value.
    """
    test = comparison.test
    if math.isnan(test.p_value):
        return f"{test.mean_difference:+.4g} in every pair\nn = {test.n}, no test"
    low, high = test.confidence_interval
    name = "p (Holm)" if is_corrected else "p"
    difference = f"{test.mean_difference:+.4g} (95 %: {low:+.4g} to {high:+.4g})"
    return f"{difference}\nn = {test.n}, {name} = {comparison.corrected:.3g}"


def to_dict(comparisons: Sequence[Comparison], metric: str, alpha: float) -> dict[str, Any]:
    """Return every result as plain values, undefined numbers as None.

    Args:
        comparisons: All arms.
        metric: The key of the score.
        alpha: Level of the tests.

    Returns:
        The content that `--json` prints.
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
        "too_few_pairs": test.n < _FEWEST,
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


def _cells(label: str, scores: Sequence[float]) -> list[str]:
    mean, std = statistics.fmean(scores), statistics.stdev(scores)
    return [label, str(len(scores)), f"{mean:.5g}", f"{std:.3g}"]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
