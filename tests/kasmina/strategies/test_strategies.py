import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.strategies import (
    STRATEGIES,
    DriftControlled,
    FixedRamp,
    GradNormGated,
    GraftingStrategy,
    GraftObservation,
    PerformanceLinked,
    make_strategy,
)
from esper.leyline.errors import ConfigError
from esper.testing import check_strategy

NUMBERS = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 10))
OBSERVATIONS = st.lists(st.builds(GraftObservation, NUMBERS, NUMBERS, NUMBERS), max_size=60)


@pytest.mark.parametrize("ramp", [1, 2, 20, 137])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_keeps_the_contract(name, ramp):
    check_strategy(lambda: make_strategy(name, ramp))


@pytest.mark.parametrize("name", STRATEGIES)
@given(observations=OBSERVATIONS, cut=st.integers(0, 60))
def test_alpha_never_falls_and_a_resumed_ramp_is_the_same(name, observations, cut):
    strategy, alphas = make_strategy(name, 7), [0.0]
    for step, observation in enumerate(observations):
        if step == cut:
            state, strategy = strategy.state_dict(), make_strategy(name, 7)
            strategy.load_state_dict(state)
        alphas.append(strategy.update(observation))
    whole = make_strategy(name, 7)
    assert [whole.update(observation) for observation in observations] == alphas[1:]
    assert alphas == sorted(alphas)
    assert alphas[-1] <= 1.0


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_ramp_resumed_with_another_length_stays_within_bounds(name):
    long, short = make_strategy(name, 100), make_strategy(name, 5)
    for _ in range(50):
        long.update(GraftObservation(1.0, 0.0, 1.0))
    short.load_state_dict(long.state_dict())
    assert short.alpha == short.update(GraftObservation(1.0, 0.0, 1.0)) == 1.0


def test_an_unknown_strategy():
    with pytest.raises(ConfigError, match="fixed_ramp"):
        make_strategy("sudden", 3)


def test_performance_linked_holds_while_the_loss_gets_worse():
    ramp = PerformanceLinked(ramp_steps=50)
    for _ in range(10):
        ramp.update(GraftObservation(1.0))
    assert ramp.alpha == pytest.approx(0.2)
    for step in range(20):
        ramp.update(GraftObservation(2.0 + 0.1 * step))
    held = ramp.alpha
    assert held < 0.3
    for _ in range(10):
        ramp.update(GraftObservation(math.nan))
    assert ramp.alpha == held
    for _ in range(60):
        ramp.update(GraftObservation(0.5))
    assert ramp.alpha == 1.0


def test_drift_controlled_pauses_while_the_weights_jump():
    ramp = DriftControlled(ramp_steps=10, threshold=0.02)
    drift = 0.0
    for jump, moves in ((0.01, True), (0.05, False), (0.0, True), (-0.03, False), (math.nan, False), (0.01, True)):
        before = ramp.alpha
        drift = drift + jump if math.isfinite(jump) else drift
        ramp.update(GraftObservation(1.0, drift if math.isfinite(jump) else math.nan))
        assert (ramp.alpha > before) == moves, jump


def test_grad_norm_gated_advances_inside_its_band():
    ramp = GradNormGated(ramp_steps=10, low=0.1, high=1.0)
    moves = []
    for norm in (0.0, 0.0, 0.05, 0.1, 1.0, 1.1, math.nan, math.inf, 0.5):
        before = ramp.alpha
        ramp.update(GraftObservation(1.0, 0.0, norm))
        moves.append(ramp.alpha > before)
    # The first step is free: a child at alpha 0 has no gradient yet.
    assert moves == [True, False, False, True, True, False, False, False, True]


def test_a_fixed_ramp_is_linear():
    ramp = FixedRamp(ramp_steps=8)
    assert [ramp.update(GraftObservation(math.nan)) for _ in range(10)] == [min(1, i / 8) for i in range(1, 11)]


class Falls(GraftingStrategy):
    def update(self, observation):
        self.steps = (self.steps + 1) % (self.ramp_steps + 2)
        return self.alpha


class Sticks(GraftingStrategy):
    def update(self, observation):
        return self.alpha


class Forgets(GraftingStrategy):
    def update(self, observation):
        return self._advance()

    def state_dict(self):
        return {}


class Jumps(GraftingStrategy):
    def update(self, observation):
        return self._advance() * 1.5


@pytest.mark.parametrize(
    ("broken", "match"),
    [(Falls, "left 1|went from"), (Sticks, "must reach 1"), (Forgets, "changed when"), (Jumps, "went from|disagree")],
)
def test_the_checker_notices_broken_strategies(broken, match):
    with pytest.raises(AssertionError, match=match):
        check_strategy(lambda: broken(ramp_steps=5))
