from __future__ import annotations

import math
import sys
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import special, stats

from lightning_revbn import paired_t_test
from lightning_revbn.compare import Alternative, holm, least_detectable_effect, wilcoxon_p_value

# Of eight seeds, with gains and losses.
BASELINE = [97.22, 97.33, 97.11, 97.44, 97.00, 97.55, 97.22, 97.33]
PROPOSED = [97.88, 97.33, 97.66, 98.00, 97.77, 97.44, 98.11, 97.66]
ALTERNATIVES = get_args(Alternative)

scores = st.floats(-1000, 1000, allow_subnormal=False)


def p_value(t: float, degrees: int, alternative: str) -> float:
    """The area under Student's t, from the incomplete beta function (Abramowitz and Stegun, 26.7.1)."""
    both_tails = float(special.betainc(degrees / 2, 0.5, degrees / (degrees + t**2)))
    if alternative == "two-sided":
        return both_tails
    return both_tails / 2 if (t > 0) == (alternative == "greater") else 1 - both_tails / 2


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_statistic_and_p_value_are_those_of_scipy(alternative: Alternative) -> None:
    result = paired_t_test(PROPOSED, BASELINE, alternative=alternative)
    reference: Any = stats.ttest_rel(PROPOSED, BASELINE, alternative=alternative)
    assert result.statistic == pytest.approx(reference.statistic, rel=1e-12)
    assert result.p_value == pytest.approx(reference.pvalue, rel=1e-12)
    assert result.alternative == alternative


def test_the_default_is_one_sided_for_a_proposed_that_is_higher() -> None:
    result = paired_t_test(PROPOSED, BASELINE)
    assert result == paired_t_test(PROPOSED, BASELINE, alternative="greater")
    assert result.p_value < 0.05
    assert paired_t_test(BASELINE, PROPOSED).p_value == pytest.approx(1 - result.p_value, rel=1e-12)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_the_confidence_interval_is_two_sided_whatever_the_alternative(alternative: Alternative, level: float) -> None:
    result = paired_t_test(PROPOSED, BASELINE, alternative=alternative, confidence_level=level)
    reference: Any = stats.ttest_rel(PROPOSED, BASELINE)
    assert result.confidence_interval == pytest.approx(tuple(reference.confidence_interval(level)), rel=1e-12)
    assert result.confidence_level == level


def test_a_result_is_what_a_calculation_by_hand_gives() -> None:
    result = paired_t_test([3.0, 5.0, 10.0], [2.0, 3.0, 7.0])  # differences 1, 2, 3: mean 2, standard deviation 1
    assert (result.n, result.mean_difference, result.std_difference) == (3, 2.0, 1.0)
    assert result.effect_size == 2.0
    assert result.statistic == pytest.approx(2 * math.sqrt(3), rel=1e-15)
    # With two degrees of freedom Student's t has the distribution function 1/2 + t / (2 sqrt(2 + t^2)).
    assert result.p_value == pytest.approx(0.5 - 2 * math.sqrt(3) / (2 * math.sqrt(14)), rel=1e-12)
    # Its 97.5 % point solves t / sqrt(2 + t^2) = 0.95.
    half = math.sqrt(2 * 0.95**2 / (1 - 0.95**2)) / math.sqrt(3)
    assert result.confidence_interval == pytest.approx((2 - half, 2 + half), rel=1e-12)


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(scores, scores), min_size=2, max_size=30), alternative=st.sampled_from(ALTERNATIVES))
def test_random_pairs_give_what_the_formulas_give(pairs: list[tuple[float, float]], alternative: Alternative) -> None:
    proposed, baseline = np.array(pairs).T
    difference = proposed - baseline
    n, mean, spread = len(difference), difference.mean(), difference.std(ddof=1)
    assume(spread > 1e-6 * np.abs(pairs).max())  # below, rounding decides on both sides
    assume(spread > 1e-100)  # below, the squares of the reference underflow
    result = paired_t_test(proposed, baseline, alternative=alternative)
    t = mean / (spread / math.sqrt(n))
    assert result.n == n
    assert result.mean_difference == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert result.std_difference == pytest.approx(spread, rel=1e-9)
    assert result.statistic == pytest.approx(t, rel=1e-6, abs=1e-6)
    assert result.effect_size == pytest.approx(t / math.sqrt(n), rel=1e-6, abs=1e-6)
    assert result.p_value == pytest.approx(p_value(t, n - 1, alternative), rel=1e-4, abs=1e-9)
    low, high = result.confidence_interval
    assert low < result.mean_difference < high


def test_exchanging_the_sides_turns_the_sign_of_everything() -> None:
    forward, backward = paired_t_test(PROPOSED, BASELINE), paired_t_test(BASELINE, PROPOSED, alternative="less")
    assert backward.mean_difference == pytest.approx(-forward.mean_difference)
    assert backward.effect_size == pytest.approx(-forward.effect_size)
    assert backward.p_value == pytest.approx(forward.p_value)
    assert backward.confidence_interval == pytest.approx([-bound for bound in reversed(forward.confidence_interval)])


def test_generators_and_arrays_give_what_lists_give() -> None:
    expected = paired_t_test(PROPOSED, BASELINE)
    assert paired_t_test((score for score in PROPOSED), iter(BASELINE)) == expected
    assert paired_t_test(np.array(PROPOSED), np.array(BASELINE)) == expected


def test_a_result_holds_plain_numbers() -> None:
    result = paired_t_test(np.array(PROPOSED), np.array(BASELINE))
    values = [result.mean_difference, result.std_difference, result.statistic, result.p_value, result.effect_size]
    assert {type(value) for value in [*values, *result.confidence_interval]} == {float}


def test_sides_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a score per seed on both sides, got 3 proposed and 2 baseline"):
        paired_t_test([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_pairs_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"at least two pairs, got {n}: run more seeds"):
        paired_t_test([97.8] * n, [97.2] * n)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("side", "position"), [("proposed", 0), ("baseline", 2)])
def test_a_score_that_is_not_finite_is_refused_with_its_side_and_position(
    side: str, position: int, value: float
) -> None:
    sides = {"proposed": [1.0, 2.0, 4.0], "baseline": [1.0, 1.0, 1.0]}
    sides[side][position] = value
    with pytest.raises(ValueError, match=rf"{side}\[{position}\] is {value}: a run that failed has no score"):
        paired_t_test(**sides)


def test_an_unknown_alternative_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"alternative='larger' is unknown: use 'greater', 'less' or 'two-sided'"):
        paired_t_test(PROPOSED, BASELINE, alternative="larger")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, -0.5, math.nan])
def test_a_confidence_level_outside_0_to_1_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match=rf"confidence_level={level} must be between 0 and 1"):
        paired_t_test(PROPOSED, BASELINE, confidence_level=level)


@pytest.mark.parametrize(
    ("proposed", "baseline"),
    [
        ([97.0, 98.0, 99.0], [97.0, 98.0, 99.0]),
        ([97.8, 98.1, 97.7], [97.3, 97.6, 97.2]),  # all 0.5, but for the rounding of each score
    ],
)
@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_equal_differences_give_nan_and_a_warning(
    proposed: list[float], baseline: list[float], alternative: Alternative
) -> None:
    with pytest.warns(UserWarning, match="all differences are equal") as caught:
        result = paired_t_test(proposed, baseline, alternative=alternative)
    assert caught[0].filename == __file__
    assert result.mean_difference == pytest.approx(proposed[0] - baseline[0])
    numbers = (result.statistic, result.p_value, result.effect_size, *result.confidence_interval)
    assert all(math.isnan(value) for value in numbers)


def test_differences_that_differ_by_one_image_of_a_million_are_not_taken_for_equal() -> None:
    result = paired_t_test([97.0001, 97.0002, 97.0001], [97.0, 97.0, 97.0])
    assert result.p_value == pytest.approx(
        float(stats.ttest_1samp([1, 2, 1], 0, alternative="greater").pvalue), rel=1e-4
    )


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)  # makes `import scipy` fail
    with pytest.raises(ImportError, match=r"paired_t_test needs scipy: pip install 'lightning-revbn\[compare\]'"):
        paired_t_test(PROPOSED, BASELINE)


def test_equal_gains_of_float32_metrics_are_taken_for_equal() -> None:
    correct = np.array([512, 603, 777, 870])
    scores = [np.float32(count / 899) * 100 for count in correct]
    gained = [np.float32((count + 1) / 899) * 100 for count in correct]
    assert len({float(a) - float(b) for a, b in zip(gained, scores, strict=True)}) > 1  # by rounding
    with pytest.warns(UserWarning, match="all differences are equal"):
        assert math.isnan(paired_t_test(gained, scores).p_value)


@pytest.mark.parametrize("scores", [{1: 97.0, 2: 98.0}, "97"])
def test_scores_without_an_order_are_refused(scores: object) -> None:
    with pytest.raises(TypeError, match="proposed takes scores in the order of the seeds"):
        paired_t_test(scores, [1.0, 2.0])  # type: ignore[arg-type]


def test_a_score_that_is_no_number_is_named() -> None:
    with pytest.raises(TypeError, match=r"baseline\[1\] is not a number: \[2.0\]"):
        paired_t_test([1.0, 2.0], [1.0, [2.0]])  # type: ignore[list-item]


def test_very_large_scores_do_not_overflow() -> None:
    result = paired_t_test([2e200, 3e200, 5e200], [1e200, 1e200, 1e200])
    assert result.p_value == pytest.approx(paired_t_test([2, 3, 5], [1, 1, 1]).p_value)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_the_signed_rank_test_is_scipys_on_scores_without_ties(alternative: Alternative) -> None:
    proposed, baseline = [3.1, 4.7, 5.2, 8.8, 9.9, 4.0], [3.0, 4.5, 5.5, 8.0, 8.5, 4.6]
    reference: Any = stats.wilcoxon(proposed, baseline, alternative=alternative)
    assert wilcoxon_p_value(proposed, baseline, alternative=alternative) == pytest.approx(reference.pvalue, rel=1e-12)


def test_the_signed_rank_test_takes_rounding_of_float32_for_equal() -> None:
    rounded = [float(np.float32(score)) for score in BASELINE]
    assert rounded != BASELINE
    assert math.isnan(wilcoxon_p_value(rounded, BASELINE))


@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=8))
def test_holms_correction_rejects_what_his_procedure_rejects(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for alpha in (0.01, 0.05, 0.3):
        rejected: set[int] = set()
        for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[index] * (len(p_values) - rank) > alpha:
                break
            rejected.add(index)
        ties = {index for index, p in enumerate(p_values) if any(p == p_values[other] for other in rejected)}
        assert rejected <= {index for index, p in enumerate(corrected) if p <= alpha} <= ties


def test_a_test_that_says_nothing_counts_as_a_question() -> None:
    corrected = holm([0.01, math.nan, 0.02])
    assert corrected[::2] == pytest.approx([0.03, 0.04])
    assert math.isnan(corrected[1])


def test_without_an_effect_one_in_twenty_experiments_is_significant() -> None:
    generator = np.random.default_rng(0)
    pairs = generator.normal(97.5, 0.2, (10_000, 2, 8))
    found = sum(paired_t_test(proposed, baseline).p_value <= 0.05 for proposed, baseline in pairs)
    assert found / 10_000 == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize(("alternative", "power"), [("greater", 0.8), ("less", 0.9), ("two-sided", 0.8)])
def test_the_least_detectable_effect_is_found_as_often_as_it_says(alternative: Alternative, power: float) -> None:
    effect = least_detectable_effect(8, power=power, alternative=alternative)
    sign = -1 if alternative == "less" else 1
    differences = np.random.default_rng(1).normal(sign * effect, 1.0, (40_000, 8))
    reference: Any = stats.ttest_1samp(differences, 0.0, axis=1, alternative=alternative)
    assert (reference.pvalue <= 0.05).mean() == pytest.approx(power, abs=0.01)


@pytest.mark.parametrize(("n", "options"), [(1, {}), (8, {"level": 0.9}), (8, {"power": 1.0})])
def test_impossible_questions_of_power_are_refused(n: int, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        least_detectable_effect(n, **options)


@pytest.mark.parametrize("n", [2, 4, 15, 40])
def test_the_least_effect_of_a_test_in_both_directions_is_found_for_few_and_many_pairs(n: int) -> None:
    for level in (0.05, 1e-4):
        effect = least_detectable_effect(n, level=level, alternative="two-sided")
        # Beyond the effect's own direction next to nothing is left of the other tail.
        assert effect == pytest.approx(least_detectable_effect(n, level=level / 2), rel=2e-3)


def test_a_level_that_is_too_small_for_so_few_pairs_is_said() -> None:
    with pytest.raises(ValueError, match=r"level=1e-09 is too small for n=2 pairs"):
        least_detectable_effect(2, level=1e-9)
