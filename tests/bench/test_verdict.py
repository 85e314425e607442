"""The words follow the interval, and never say more."""

from itertools import product

import pytest

from esper.bench.arms import GROWN, OFF, WIDE
from esper.bench.results import Results
from esper.bench.verdict import NOT, OPEN, PAID, sentences, verdict
from tests.bench.samples import plain_row

SPREAD = (0.0, 0.01, -0.01, 0.02, -0.02)


def results(gain: float, *, seeds: int = 5, over: str = WIDE, work: float = 1000.0) -> Results:
    """The live trial is better by `gain` on average, a little more on some seeds."""
    losses = {(over, s): 1.0 + 0.1 * s for s in range(seeds)}
    grown = {(GROWN, s): 1.0 + 0.1 * s - gain - SPREAD[s] for s in range(seeds)}
    rows = {at: plain_row(loss, train_macs=1000.0 if at[0] == GROWN else work) for at, loss in (losses | grown).items()}
    return Results("mine", rows)


@pytest.mark.parametrize(("gain", "said"), [(0.2, PAID), (-0.2, NOT), (0.005, OPEN)])
@pytest.mark.parametrize("over", [WIDE, OFF])
def test_the_verdict_follows_the_interval(gain: float, said: str, over: str) -> None:
    told = verdict(results(gain, over=over))
    assert told.startswith(f"mine: {said}: ") and "at equal compute" in told and "paired bootstrap" in told
    assert f"better on {sum(gain + s > 0 for s in SPREAD)} of 5 seeds" in told


def test_one_seed_tells_nothing_and_three_have_student() -> None:
    assert OPEN in verdict(results(0.5, seeds=1)) and "one seed, no interval" in verdict(results(0.5, seeds=1))
    assert PAID in verdict(results(0.5, seeds=3)) and "3 seeds are too few to resample" in verdict(
        results(0.5, seeds=3)
    )


def test_unequal_compute_is_told() -> None:
    assert "at 1.30 times its compute" in verdict(results(0.2, work=1300.0))


def test_a_diverged_run_leaves_the_verdict_open() -> None:
    found = results(0.2)
    found.rows[GROWN, 4] = plain_row(None)
    assert OPEN in verdict(found) and "a run diverged" in verdict(found)


def test_without_a_pair_there_is_no_verdict() -> None:
    assert OPEN in verdict(Results("mine")) and OPEN in verdict(Results("mine", {(GROWN, 0): plain_row()}))


def test_what_was_not_made_and_what_is_the_same_run_is_told() -> None:
    found = results(0.2, over=OFF, seeds=2)
    found.rows["from_start", 1] = found.rows[OFF, 1]
    found.failed["lora", 0] = "no room"
    told = " ".join(sentences(found))
    assert "the same run as off: from_start (seed 1)" in told and "lora seed 0 (no room)" in told


def test_what_was_found_is_compared_with_knowing_it_beforehand() -> None:
    found = results(0.0)
    found.rows.update({("from_start", s): plain_row(0.5 + 0.1 * s + SPREAD[s]) for s in range(5)})
    assert any(s.startswith("Had it been known beforehand") for s in sentences(found))


def test_seeds_that_only_one_arm_has_are_not_compared() -> None:
    found = results(0.2)
    for arm, seed in product((GROWN,), (3, 4)):
        del found.rows[arm, seed]
    assert "of 3 seeds" in verdict(found)
