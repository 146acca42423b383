"""Paired comparison of runs: did the change help, over the same seeds?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

Alternative: TypeAlias = Literal["greater", "less", "two-sided"]


@dataclass(frozen=True)
class PairedTTest:
    """Result of `paired_t_test`; differences are proposed - baseline, in the units of the metric.

    Attributes:
        n: Number of pairs.
        mean_difference: Mean of the differences.
        std_difference: Standard deviation of the differences, with n - 1 in the denominator.
        statistic: Student's t, `mean_difference / (std_difference / sqrt(n))`, with n - 1 degrees of freedom.
        p_value: Probability of a t at least this far in the direction of `alternative`, if there were no effect.
        confidence_interval: Two-sided interval of the mean difference, whatever `alternative` is.
        confidence_level: Its level.
        effect_size: Cohen's d_z, `mean_difference / std_difference`.
        alternative: The direction that was declared.
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

    The paper's test: a paired t-test, one-sided (proposed > baseline), significant at p <= 0.05
    (https://arxiv.org/abs/2110.13989). Declare the direction before looking at the runs. Where all differences are
    equal the test can say nothing: statistic, p-value and effect size are NaN, with a warning.

    Args:
        proposed: One score a seed, shape `(n,)`.
        baseline: The scores of the same seeds in the same order, shape `(n,)`.
        alternative: `"greater"` (proposed > baseline), `"less"` or `"two-sided"`.
        confidence_level: Level of the confidence interval, between 0 and 1.

    Returns:
        The result.

    Raises:
        ValueError: If the lengths differ, there are fewer than two pairs, a score is not finite, or an option is
            unknown.
        ImportError: If scipy is missing.

    Example:
        >>> result = paired_t_test(proposed=[97.8, 98.1, 97.5], baseline=[97.2, 97.7, 97.3])
        >>> round(result.mean_difference, 3), round(result.p_value, 4)
        (0.4, 0.0371)
    """
    first, second = [float(score) for score in proposed], [float(score) for score in baseline]
    if len(first) != len(second):
        raise ValueError(
            f"a paired test needs one score a seed on both sides, got {len(first)} proposed and {len(second)} baseline"
        )
    n = len(first)
    if n < 2:
        raise ValueError(f"a paired test needs at least two pairs, got {n}: run more seeds")
    for side, scores in (("proposed", first), ("baseline", second)):
        for position, score in enumerate(scores):
            if not math.isfinite(score):
                raise ValueError(f"{side}[{position}] is {score}: a run that failed has no score to compare")
    if alternative not in get_args(Alternative):
        raise ValueError(f"alternative={alternative!r} is unknown: use 'greater', 'less' or 'two-sided'")
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level={confidence_level!r} must be between 0 and 1")
    try:
        from scipy import stats as scipy_stats
    except ImportError as error:
        raise ImportError("paired_t_test needs scipy: pip install 'lightning-revbn[compare]'") from error

    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = math.fsum(differences) / n
    spread = math.sqrt(math.fsum((difference - mean) ** 2 for difference in differences) / (n - 1))
    # Equal differences of scores such as 97.6 differ by rounding alone.
    rounding = 4 * math.ulp(max(map(abs, [*first, *second])))
    if max(differences) - min(differences) <= rounding:
        warnings.warn("all differences are equal: a t-test can say nothing about them", stacklevel=2)
        nan = math.nan
        return PairedTTest(n, mean, 0.0, nan, nan, (mean, mean), confidence_level, nan, alternative)
    stats: Any = scipy_stats
    result = stats.ttest_rel(first, second, alternative=alternative)
    half: float = float(stats.t.ppf((1 + confidence_level) / 2, n - 1)) * spread / math.sqrt(n)
    return PairedTTest(
        n=n,
        mean_difference=mean,
        std_difference=spread,
        statistic=float(result.statistic),
        p_value=float(result.pvalue),
        confidence_interval=(mean - half, mean + half),
        confidence_level=confidence_level,
        effect_size=mean / spread,
        alternative=alternative,
    )
