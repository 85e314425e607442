"""Which kernel is compiled next when nobody asks, and how."""

from hypothesis import given
from hypothesis import strategies as st

from esper.tezzeret.idle import MAX_TRIES, PAUSE_S, RECENT_S, Candidate, Tier, choose, next_idle
from tests.tezzeret.samples import spec

SPEC = spec()
NOW = 1e9
candidates = st.builds(
    Candidate,
    st.just(SPEC),
    st.just("standard"),
    st.sampled_from(Tier),
    interest=st.floats(0, 1),
    since=st.floats(NOW - 2 * RECENT_S, NOW),
    tried=st.floats(NOW - 4 * PAUSE_S, NOW),
    tries=st.integers(0, MAX_TRIES),
)


@given(st.lists(candidates, max_size=8))
def test_a_more_urgent_tier_always_goes_first(given_: list[Candidate]) -> None:
    chosen = next_idle(given_, NOW)
    due = [one for one in given_ if next_idle([one], NOW) is not None]
    assert (chosen is None) == (not due)
    if chosen is not None:
        assert chosen.tier == min(one.tier for one in due)
        assert chosen.interest == max(one.interest for one in due if one.tier is chosen.tier)


@given(candidates)
def test_a_failure_is_tried_again_later_and_not_for_ever(one: Candidate) -> None:
    due = next_idle([one], NOW) is not None
    if one.tries >= MAX_TRIES or (one.tries and NOW - one.tried < PAUSE_S * 2 ** (one.tries - 1)):
        assert not due
    elif one.tier is not Tier.RECENT_FAILURE or NOW - one.since <= RECENT_S:
        assert due


def test_of_equals_the_one_that_waits_longest_goes_first() -> None:
    young, old = (Candidate(SPEC, "standard", Tier.HIGH_INTEREST, since=NOW - age) for age in (1.0, 9.0))
    assert next_idle([young, old], NOW) is old


@given(st.floats(0, 1), st.integers(0, 100))
def test_what_was_asked_for_is_never_overruled(interest: float, waiting: int) -> None:
    for asked in ("fast", "standard", "aggressive"):
        assert choose(asked, interest, waiting, over_budget=True) == asked  # type: ignore[arg-type]


def test_load_and_budget_send_what_few_want_to_the_fast_tier() -> None:
    assert choose(None, 0.5, 5, over_budget=False) == "standard"
    assert choose(None, 0.5, 50, over_budget=False) == "fast"
    assert choose(None, 1.0, 20, over_budget=False) == "standard"
    assert choose(None, 1.0, 0, over_budget=True) == "fast"
    assert choose(None, 1.0, 0, over_budget=False) == "aggressive"
