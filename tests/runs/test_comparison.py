from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from helpers.arms import BASELINE, BETTER, WORSE
from scipy import stats

from lightning_revbn.runs.comparison import Comparison, compare, conclude, to_dict


def compared(baseline: Sequence[float], **arms: Sequence[float]) -> list[Comparison]:
    by_seed = {label: dict(enumerate(scores, start=1)) for label, scores in arms.items()}
    return compare(dict(enumerate(baseline, start=1)), by_seed, "greater")


def test_every_number_is_scipys() -> None:
    found = to_dict(compared(BASELINE, b=BETTER, c=WORSE), "test_acc", 0.05)
    assert found["n"] == 6
    assert found["seeds"] == [1, 2, 3, 4, 5, 6]
    p_values = []
    for arm, scores in zip(found["arms"], (BETTER, WORSE), strict=True):
        assert arm["scores"] == scores
        t: Any = stats.ttest_rel(scores, BASELINE, alternative="greater")
        both: Any = stats.ttest_rel(scores, BASELINE)
        w: Any = stats.wilcoxon(scores, BASELINE, alternative="greater")
        differences = [after - before for after, before in zip(scores, BASELINE, strict=True)]
        assert arm["p_value"] == pytest.approx(t.pvalue, rel=1e-9)
        assert arm["statistic"] == pytest.approx(t.statistic, rel=1e-9)
        assert arm["wilcoxon_p_value"] == pytest.approx(w.pvalue, rel=1e-9)
        assert arm["confidence_interval"] == pytest.approx(list(both.confidence_interval(0.95)), rel=1e-9)
        assert arm["effect_size"] == pytest.approx(stats.tmean(differences) / stats.tstd(differences), rel=1e-9)
        p_values.append(t.pvalue)
    assert found["arms"][0]["holm_p_value"] == pytest.approx(2 * p_values[0], rel=1e-9)
    assert found["arms"][1]["holm_p_value"] == pytest.approx(p_values[1], rel=1e-9)


def test_few_pairs_are_warned_of() -> None:
    lines = conclude(compared(BASELINE[:3], b=BETTER[:3]), 0.05)
    assert any("Warning: 3 pairs are too few to say anything" in line for line in lines)


def test_equal_differences_are_told() -> None:
    comparisons = compared(BASELINE, b=[score + 0.01 for score in BASELINE])
    assert conclude(comparisons, 0.05)[0].startswith("b: all differences are +0.01; a test can say nothing")
    assert to_dict(comparisons, "test_acc", 0.05)["arms"][0]["p_value"] is None
