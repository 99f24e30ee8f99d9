"""Figures over seeds: Student's interval against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cfm_train.evaluation.seeds import over_seeds, student_quantile


@pytest.mark.parametrize("degrees", [*range(1, 31), 99, 100])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_the_quantile_is_students(degrees: int, level: float) -> None:
    expected = stats.t.ppf((1 + level) / 2, degrees)
    assert student_quantile(degrees, level) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_interval_is_that_of_a_t_test(count: int) -> None:
    values = np.random.default_rng(count).normal(0.8, 0.02, count).tolist()
    found = over_seeds(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["value"] == pytest.approx(np.mean(values)) and found["n"] == count


def test_equal_runs_have_no_spread() -> None:
    assert over_seeds([0.75, 0.75, 0.75]) == {"value": 0.75, "low": 0.75, "high": 0.75, "n": 3}
