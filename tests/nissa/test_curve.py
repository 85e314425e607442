import math

from hypothesis import given
from hypothesis import strategies as st

from esper.nissa.curve import LIMIT, LossCurve


@given(st.integers(min_value=0, max_value=9000))
def test_a_curve_stays_short_and_in_order(steps: int) -> None:
    curve = LossCurve()
    for step in range(1, steps + 1):
        curve.add(step, float(step))
    found = [step for step, _ in curve.points]
    assert len(found) <= LIMIT
    assert found == sorted(set(found))
    assert steps - (found[-1] if found else 0) < curve.stride + 1


def test_a_short_run_keeps_every_loss() -> None:
    curve = LossCurve()
    for step in range(1, 11):
        curve.add(step, step / 2)
    assert curve.points == [(step, step / 2) for step in range(1, 11)]


def test_a_long_run_keeps_means() -> None:
    curve = LossCurve()
    for step in range(1, 2 * LIMIT + 1):
        curve.add(step, 1.0 if step % 2 else 3.0)
    assert curve.stride > 1
    assert all(loss == 2.0 for _, loss in curve.points[:100])


def test_a_loss_that_is_not_a_number_is_kept_as_such() -> None:
    curve = LossCurve()
    curve.add(1, math.nan)
    assert math.isnan(curve.points[0][1])


def test_plain_data_and_back() -> None:
    curve = LossCurve(stride=3)
    for step in range(5):
        curve.add(step, 1.0)
    assert LossCurve.from_plain(curve.to_plain()) == curve
