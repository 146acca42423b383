"""Compares runs with and without a change in pairs of the same seed, by tests of significance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

__all__ = [
    "Alternative",
    "PairedTTest",
    "holm",
    "least_detectable_effect",
    "paired_t_test",
    "wilcoxon_p_value",
]

Alternative: TypeAlias = Literal["greater", "less", "two-sided"]


@dataclass(frozen=True)
class PairedTTest:
    """Result of `paired_t_test`; differences are proposed - baseline, in the units of the metric.

    Attributes:
        n: Number of pairs.
        mean_difference: Mean of the differences.
        std_difference: Standard deviation of the differences, with n - 1 in the denominator.
        statistic: Student's t, `mean_difference / (std_difference / sqrt(n))`, with n - 1 degrees of freedom.
        p_value: Probability, without an effect, of a t at least as far in the direction of `alternative`.
        confidence_interval: Two-sided interval of the mean difference, for every `alternative`.
        confidence_level: The level of the interval.
        effect_size: Cohen's d_z, `mean_difference / std_difference`.
        alternative: The declared direction of the effect.
    """

    n: int
    mean_difference: float
    std_difference: float
    statistic: float
    p_value: float
    confidence_interval: tuple[float, float]
    confidence_level: float
    effect_size: float
    alternative: Alternative


def paired_t_test(
    proposed: Iterable[float],
    baseline: Iterable[float],
    *,
    alternative: Alternative = "greater",
    confidence_level: float = 0.95,
) -> PairedTTest:
    """Test whether runs with a change score higher than the runs without it over the same seeds.

    The paper uses this test: a paired t-test, one-sided (proposed > baseline), significant at p <= 0.05
    (https://arxiv.org/abs/2110.13989). Declare the direction before looking at the runs. If all differences are equal,
    up to the rounding of float32, the test has no answer: statistic, p-value, interval and effect size are NaN, with a
    warning.

    Args:
        proposed: A score per seed, shape `(n,)`.
        baseline: The scores of the same seeds in the same order, shape `(n,)`.
        alternative: `"greater"` (proposed > baseline), `"less"` or `"two-sided"`.
        confidence_level: Level of the confidence interval, between 0 and 1.

    Returns:
        The result.

    Raises:
        ValueError: If the lengths differ, there are fewer than two pairs, a score is not finite, or an option is
            unknown.
        TypeError: If a score is not a number, or the scores are a string or a mapping.
        ImportError: If scipy is missing.

    Example:
        >>> result = paired_t_test(proposed=[97.8, 98.1, 97.5], baseline=[97.2, 97.7, 97.3])
        >>> round(result.mean_difference, 3), round(result.p_value, 4)
        (0.4, 0.0371)
    """
    first, second = _pairs(proposed, baseline)
    if alternative not in get_args(Alternative):
        raise ValueError(f"alternative={alternative!r} is unknown: use 'greater', 'less' or 'two-sided'")
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level={confidence_level!r} must be between 0 and 1")
    stats = _scipy_stats("paired_t_test")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    # Metrics are float32, so a score such as 97.6 is rounded by up to 2^-24 of itself, and equal differences of such
    # scores differ by that rounding.
    if max(differences) - min(differences) <= 2**-22 * max(map(abs, [*first, *second])):
        warnings.warn("all differences are equal: a t-test can say nothing about them", stacklevel=2)
        n, mean, nan = len(differences), math.fsum(differences) / len(differences), math.nan
        return PairedTTest(n, mean, 0.0, nan, nan, (nan, nan), confidence_level, nan, alternative)
    return _students_t(differences, stats, alternative, confidence_level)


def wilcoxon_p_value(
    proposed: Iterable[float], baseline: Iterable[float], *, alternative: Alternative = "greater"
) -> float:
    """Return the p-value of Wilcoxon's signed-rank test, which does not assume a normal distribution.

    The test uses only the order of the differences. So it shows whether a small p-value of the t-test rests on a single
    extreme pair. With n pairs its p-value is at least `2**-n` (one-sided): below 5 pairs it is never under 0.05.

    Args:
        proposed: A score per seed, shape `(n,)`.
        baseline: The scores of the same seeds in the same order, shape `(n,)`.
        alternative: The direction, as in `paired_t_test`.

    Returns:
        The p-value; NaN if all pairs are equal, or without pairs.

    Raises:
        ValueError: If a score is not finite, or the lengths differ.
        TypeError: If a score is not a number, or the scores are a string or a mapping.
        ImportError: If scipy is missing.

    Example:
        >>> wilcoxon_p_value([2.0, 4.0, 6.0, 9.0, 11.0], [1.0, 2.0, 3.0, 5.0, 6.0])
        0.03125
    """
    first, second = _scores("proposed", proposed), _scores("baseline", baseline)
    stats = _scipy_stats("wilcoxon_p_value")
    # As in the t-test, scores that differ only by the rounding of float32 are equal.
    close = 2**-22 * max(map(abs, [*first, *second]), default=0.0)
    differences = [a - b if abs(a - b) > close else 0.0 for a, b in zip(first, second, strict=True)]
    if not any(differences):
        return math.nan
    return float(stats.wilcoxon(differences, alternative=alternative).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of several tests against the same baseline.

    Holm, "A simple sequentially rejective multiple test procedure" (1979): if every test is judged at level alpha, the
    probability of any false positive among all tests is at most alpha.

    Args:
        p_values: The p-values of m tests, shape `(m,)`. NaN, the p-value of a test without an answer, counts as a test.

    Returns:
        The corrected p-values in the same order, shape `(m,)`; NaN stays.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    ascending = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    least = 0.0
    for rank, (p, index) in enumerate(ascending):
        least = max(least, min(1.0, (len(p_values) - rank) * p))
        corrected[index] = least
    return corrected


def least_detectable_effect(
    n: int, *, level: float = 0.05, power: float = 0.8, alternative: Alternative = "greater"
) -> float:
    """Return the least effect that a paired t-test of n pairs finds with a given probability.

    The test misses smaller effects with a probability of more than `1 - power`: no significance does not mean no
    effect.

    Args:
        n: Number of pairs, 2 or more.
        level: The significance level of p-values, between 0 and 1.
        power: The probability, above `level` and below 1.
        alternative: The direction, as in `paired_t_test`.

    Returns:
        Cohen's d_z: the effect in standard deviations of the differences, above 0 in every direction.

    Raises:
        ValueError: If an argument is out of range, or `level` is too small for so few pairs.
        ImportError: If scipy is missing.

    Example:
        >>> round(least_detectable_effect(8), 2), round(least_detectable_effect(15), 2)
        (0.98, 0.68)
    """
    if n < 2:
        raise ValueError(f"n={n} must be the number of pairs, 2 or more")
    if not 0 < level < power < 1:
        raise ValueError(f"level={level!r} and power={power!r} must be 0 < level < power < 1")
    stats = _scipy_stats("least_detectable_effect")
    from scipy import optimize

    optimizer: Any = optimize
    tail = level / 2 if alternative == "two-sided" else level
    critical = float(stats.t(df=n - 1).isf(tail))

    def lacking(effect: float) -> float:
        far = effect * math.sqrt(n)
        found = float(stats.nct.sf(critical, n - 1, far))
        if alternative == "two-sided":
            # For large effects scipy returns NaN for this tail, which is negligible beside the other tail there.
            other = float(stats.nct.cdf(-critical, n - 1, far))
            found += 0.0 if math.isnan(other) else other
        if math.isnan(found):
            raise ValueError(f"level={level!r} is too small for n={n} pairs: scipy cannot compute the effect")
        return power - found

    highest = 1.0
    with warnings.catch_warnings():
        # scipy warns of series that do not converge; `lacking` checks the result itself.
        warnings.simplefilter("ignore", RuntimeWarning)
        while lacking(highest) > 0:
            highest *= 2
        return float(optimizer.brentq(lacking, 0.0, highest))


def _students_t(
    differences: Sequence[float], stats: Any, alternative: Alternative, confidence_level: float
) -> PairedTTest:
    n = len(differences)
    mean = math.fsum(differences) / n
    spread = math.hypot(*(difference - mean for difference in differences)) / math.sqrt(n - 1)
    student = stats.t(df=n - 1)
    error = spread / math.sqrt(n)
    statistic = mean / error
    tails = {
        "greater": student.sf(statistic),
        "less": student.cdf(statistic),
        "two-sided": 2 * student.sf(abs(statistic)),
    }
    half = float(student.ppf((1 + confidence_level) / 2)) * error
    return PairedTTest(
        n=n,
        mean_difference=mean,
        std_difference=spread,
        statistic=statistic,
        p_value=float(tails[alternative]),
        confidence_interval=(mean - half, mean + half),
        confidence_level=confidence_level,
        effect_size=mean / spread,
        alternative=alternative,
    )


def _pairs(proposed: Iterable[float], baseline: Iterable[float]) -> tuple[list[float], list[float]]:
    """Return the scores of both sides, or raise unless they are pairs."""
    first, second = _scores("proposed", proposed), _scores("baseline", baseline)
    if len(first) != len(second):
        raise ValueError(
            f"a paired test needs a score per seed on both sides, got {len(first)} proposed and {len(second)} baseline"
        )
    if len(first) < 2:
        raise ValueError(f"a paired test needs at least two pairs, got {len(first)}: run more seeds")
    return first, second


def _scipy_stats(caller: str) -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(f"{caller} needs scipy: pip install 'lightning-revbn[compare]'") from error
    return stats


def _scores(side: str, scores: Iterable[float]) -> list[float]:
    if isinstance(scores, (str, Mapping)):
        raise TypeError(f"{side} takes scores in the order of the seeds, not a string or a mapping")
    found: list[float] = []
    for position, score in enumerate(scores):
        try:
            found.append(float(score))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{side}[{position}] is not a number: {score!r}") from error
        if not math.isfinite(found[-1]):
            raise ValueError(f"{side}[{position}] is {score}: a run that failed has no score to compare")
    return found
