"""The interval over seeds holds what it says, also for few and skewed values."""

import math

import numpy as np
import pytest

from esper.bench.estimate import BOOTSTRAP, NONE, STUDENT, Estimate


@pytest.mark.parametrize(("kind", "seeds"), [("normal", 5), ("normal", 10), ("exponential", 5)])
def test_95_of_100_intervals_hold_the_mean(kind: str, seeds: int) -> None:
    chance = np.random.default_rng(7)
    draw, mean = (chance.standard_normal, 0.0) if kind == "normal" else (chance.standard_exponential, 1.0)
    found = [Estimate.of(draw(seeds).tolist()) for _ in range(300)]
    # The percentile interval and BCa hold it in 80 to 90 of 100; the limit is three standard errors below 95.
    assert sum(e.lower <= mean <= e.upper for e in found) / len(found) > 0.912
    assert {e.method for e in found} == {BOOTSTRAP}


def test_few_seeds_have_student_and_one_has_no_interval() -> None:
    pair, one = Estimate.of([1.0, 2.0]), Estimate.of([1.0])
    assert (pair.method, one.method) == (STUDENT, NONE)
    assert (pair.upper - pair.lower) / 2 == pytest.approx(12.706 * 0.5)
    assert one.mean == 1.0 and not one.known and one.told() == "1.000"


def test_the_same_values_give_the_same_interval_and_equal_ones_a_point() -> None:
    values = [0.3, 0.1, 0.2, 0.5, 0.15, 0.4]
    assert Estimate.of(values) == Estimate.of(values)
    assert Estimate.of([-v for v in values]).lower == pytest.approx(-Estimate.of(values).upper, rel=0.1)
    assert Estimate.of([0.2] * 5)[:3] == (0.2, 0.2, 0.2)


def test_a_run_that_diverged_is_not_left_out_of_the_mean() -> None:
    found = Estimate.of([0.1, math.nan, 0.2])
    assert found.told() == "diverged" and not found.known and found.n == 3


def test_wins_and_words() -> None:
    found = Estimate.of([0.1, 0.2, -0.05, 0.15, 0.12])
    assert (found.wins, found.n) == (4, 5)
    mean, lower, upper = found.told(sign=True).replace("[", "").replace("]", "").replace(",", "").split()
    assert mean == "+.104" and lower[0] == "-" and upper[0] == "+"
