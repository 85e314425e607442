"""The gates, as pure functions of what is observed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.packets import SeedTable, SystemStatePacket
from esper.leyline.reports import Counterfactual
from esper.leyline.states import TRANSITIONS, Reason, SeedCommand, SeedState
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.contracts import Observation, SeedStatus
from esper.tamiyo.gate import advance, to_judge
from esper.tamiyo.price import price

CONFIG = TamiyoConfig(price_per_kparam=0.01, min_effect=0.001)


def observed(*seeds: SeedStatus, evidence: dict[str, float] | None = None, final: bool = False) -> Observation:
    found = {
        name: Counterfactual(mean=lower + 0.01, lower=lower, upper=lower + 0.02, n=32)
        for name, lower in (evidence or {}).items()
    }
    table = SeedTable.of(sorted({*found, *(s.seed_id for s in seeds)}))
    packet = SystemStatePacket(
        run_id="r", current_epoch=1, global_step=10, validation_loss=2.0, evidence=found, seed_states=table
    )
    return Observation(packet, seeds, (), (), total_steps=100, host_params=1000, final=final)


def seed(slot: int, state: SeedState, **given: object) -> SeedStatus:
    values = {"ready": True, "blueprint": "BP-MLP-GELU", "params": 1000} | given
    return SeedStatus(f"a#0.{slot}", state, **values)  # type: ignore[arg-type]


def verbs(observation: Observation) -> dict[str, tuple[SeedCommand, Reason]]:
    return {c.target_seed_id: (c.command, c.reason) for c in advance(observation, CONFIG).commands}


STATUSES = st.builds(
    SeedStatus,
    seed_id=st.integers(0, 5).map(lambda n: f"a#0.{n}"),
    state=st.sampled_from(SeedState),
    ready=st.booleans(),
    blueprint=st.just("BP-MLP-GELU"),
    group=st.sampled_from(["", "trial-0", "spread-0"]),
    params=st.integers(1, 10_000),
    trainable=st.booleans(),
    fault=st.sampled_from(["", "it raised"]),
)


@given(
    st.lists(STATUSES, max_size=6, unique_by=lambda s: s.seed_id),
    st.dictionaries(st.integers(0, 5).map(lambda n: f"a#0.{n}"), st.floats(-1, 1)),
    st.booleans(),
)
def test_no_decision_ever_breaks_the_table(seeds: list[SeedStatus], evidence: dict[str, float], final: bool) -> None:
    decision = advance(observed(*seeds, evidence=evidence, final=final), CONFIG)
    states = {s.seed_id: s.state for s in seeds}
    targets = [c.target_seed_id for c in decision.commands]
    assert len(set(targets)) == len(targets)
    assert all(c.command in TRANSITIONS[states[c.target_seed_id]] for c in decision.commands)


@given(st.lists(STATUSES, max_size=6, unique_by=lambda s: s.seed_id))
def test_the_same_observation_gives_the_same_decision(seeds: list[SeedStatus]) -> None:
    first, second = (advance(observed(*seeds), CONFIG) for _ in range(2))
    assert [(c.command, c.target_seed_id) for c in first.commands] == [
        (c.command, c.target_seed_id) for c in second.commands
    ]


@pytest.mark.parametrize(("lower", "kept"), [(0.0111, True), (0.0109, False), (-1.0, False)])
def test_a_graft_stays_only_if_its_lower_bound_beats_its_price(lower: float, kept: bool) -> None:
    assert price(seed(0, SeedState.EVALUATING), CONFIG) == pytest.approx(0.011)
    found = verbs(observed(seed(0, SeedState.EVALUATING), evidence={"a#0.0": lower}))
    expected = (SeedCommand.FINE_TUNE, Reason.GATE_PASSED) if kept else (SeedCommand.CULL, Reason.GATE_FAILED)
    assert found == {"a#0.0": expected}


def test_a_fixed_function_child_skips_training_and_fine_tuning() -> None:
    assert verbs(observed(seed(0, SeedState.LOADING, trainable=False)))["a#0.0"][0] is SeedCommand.GRAFT
    found = verbs(observed(seed(0, SeedState.EVALUATING, trainable=False), evidence={"a#0.0": 1.0}))
    assert found["a#0.0"][0] is SeedCommand.FOSSILIZE


def test_a_trial_keeps_its_best_per_parameter_and_drops_the_rest() -> None:
    members = [
        seed(0, SeedState.EVALUATING, group="trial-0", params=1000),
        seed(1, SeedState.EVALUATING, group="trial-0", params=4000),
        seed(2, SeedState.EVALUATING, group="trial-0", params=1000),
    ]
    found = verbs(observed(*members, evidence={"a#0.0": 0.10, "a#0.1": 0.30, "a#0.2": -0.1}))
    assert found["a#0.0"] == (SeedCommand.FINE_TUNE, Reason.GATE_PASSED)
    assert found["a#0.1"] == found["a#0.2"] == (SeedCommand.CULL, Reason.OUTCOMPETED)


def test_a_trial_that_finds_nothing_keeps_nothing() -> None:
    members = [seed(n, SeedState.EVALUATING, group="trial-0") for n in range(3)]
    found = verbs(observed(*members, evidence={m.seed_id: 0.001 for m in members}))
    assert set(found.values()) == {(SeedCommand.CULL, Reason.GATE_FAILED)}


def test_a_trial_waits_for_its_last_member() -> None:
    members = (
        seed(0, SeedState.EVALUATING, group="trial-0"),
        seed(1, SeedState.STABILIZATION, group="trial-0", ready=False),
    )
    assert to_judge(observed(*members)) == []


def test_what_is_spread_is_judged_at_the_end_of_the_run() -> None:
    spread = seed(0, SeedState.STABILIZATION, group="spread-0")
    assert verbs(observed(spread)) == {}
    assert verbs(observed(spread, final=True)) == {"a#0.0": (SeedCommand.EVALUATE, Reason.STAGE_COMPLETE)}
    broken = seed(0, SeedState.STABILIZATION, group="spread-0", fault="it raised")
    assert verbs(observed(broken)) == {"a#0.0": (SeedCommand.EVALUATE, Reason.RUNTIME_ERROR)}


@pytest.mark.parametrize("lower", [0.021, 0.023])
def test_what_is_spread_stays_or_goes_as_one(lower: float) -> None:
    """Two children of 1,000 parameters, whose prices are .011 each."""
    members = [seed(n, SeedState.EVALUATING, group="spread-0") for n in range(2)]
    found = verbs(observed(*members, evidence={m.seed_id: lower for m in members}, final=True))
    kept, gone = (SeedCommand.FINE_TUNE, Reason.GATE_PASSED), (SeedCommand.CULL, Reason.GATE_FAILED)
    assert found == dict.fromkeys([m.seed_id for m in members], kept if lower > 0.022 else gone)


def test_without_evidence_nothing_is_judged() -> None:
    assert verbs(observed(seed(0, SeedState.EVALUATING))) == {}


@pytest.mark.parametrize(
    ("state", "verb"),
    [
        (SeedState.TRAINING, SeedCommand.CULL),
        (SeedState.GRAFTING, SeedCommand.CULL),
        (SeedState.STABILIZATION, SeedCommand.EVALUATE),
        (SeedState.EVALUATING, SeedCommand.CULL),
    ],
)
def test_a_faulty_kernel_is_led_out(state: SeedState, verb: SeedCommand) -> None:
    found = verbs(observed(seed(0, state, fault="NaN", ready=False), evidence={"a#0.0": 1.0}))
    assert found == {"a#0.0": (verb, Reason.RUNTIME_ERROR)}


def test_the_end_of_a_run_leaves_nothing_half_done() -> None:
    states = [SeedState.GERMINATED, SeedState.LOADING, SeedState.TRAINING, SeedState.GRAFTING]
    found = verbs(observed(*(seed(n, s, ready=False) for n, s in enumerate(states)), final=True))
    assert [verb for verb, _ in found.values()] == [SeedCommand.CANCEL] + [SeedCommand.CULL] * 3
    assert {reason for _, reason in found.values()} == {Reason.RUN_ENDED}


def test_at_the_end_what_cannot_be_judged_is_removed() -> None:
    found = verbs(observed(seed(0, SeedState.EVALUATING), final=True))
    assert found == {"a#0.0": (SeedCommand.CULL, Reason.RUN_ENDED)}


def test_explanations_give_the_numbers() -> None:
    decision = advance(observed(seed(0, SeedState.EVALUATING), evidence={"a#0.0": 0.5}), CONFIG)
    assert "at least 0.5000" in decision.explanation
    assert "0.0110 was needed" in decision.explanation
