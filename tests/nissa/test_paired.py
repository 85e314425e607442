import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from esper.nissa.paired import MIN_SAMPLES, paired_interval, student_quantile


@pytest.mark.parametrize("freedom", [4, 5, 7, 10, 30, 191, 10_000])
def test_the_quantile_is_that_of_student(freedom: int) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.005)


@given(st.lists(st.floats(-100, 100), min_size=MIN_SAMPLES, max_size=50), st.floats(-10, 10))
def test_a_constant_gain_is_found(losses: list[float], gain: float) -> None:
    interval = paired_interval(losses, [loss - gain for loss in losses])
    assert interval is not None and interval.n == len(losses)
    assert interval.lower - 1e-9 <= gain <= interval.upper + 1e-9
    assert interval.lower <= interval.mean <= interval.upper


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=MIN_SAMPLES, max_size=30))
def test_swapping_the_runs_mirrors_the_interval(pairs: list[tuple[float, float]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    one, other = paired_interval(a, b), paired_interval(b, a)
    assert one is not None and other is not None
    assert one.lower == pytest.approx(-other.upper) and one.upper == pytest.approx(-other.lower)


@pytest.mark.parametrize(
    ("without", "with_growth"),
    [(None, [1.0] * 9), ([1.0] * 9, None), ([1.0] * 9, [1.0] * 8), ([1.0] * 4, [2.0] * 4), ([math.nan] * 9, [1.0] * 9)],
)
def test_no_interval_where_the_samples_do_not_allow_one(
    without: list[float] | None, with_growth: list[float] | None
) -> None:
    assert paired_interval(without, with_growth) is None
