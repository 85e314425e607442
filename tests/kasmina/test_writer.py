import dataclasses

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from esper.kasmina.lifecycle import stage_complete
from esper.kasmina.writer import short_hash
from esper.leyline.errors import ConfigError, IllegalTransition, KernelError, NoSuchSeed, SiteError, StateCorruption
from esper.leyline.ids import SeedId
from esper.leyline.states import TARGET, TERMINAL, TRANSITIONS, WITH_CHILD, Reason
from tests.kasmina.conftest import PATHS, C, InstantStore, Rig, S, batch, mlp, same_bits, wake

SEEDS = ("0#0.0", "2#0.0", "2#0.1", "2#1.0", "4#1.0")
NEEDS_KERNEL = (C.TRAIN, C.GRAFT)


def snapshot(rig):
    """Everything that a refused command must leave alone."""
    return (
        {seed: rig.state(seed) for seed in SEEDS},
        {name: column.clone() for name, column in rig.bank.arrays.columns.items()},
        rig.bank.topology(),
        list(rig.bank.state_dict()),
        len(rig.events),
    )


def equal(one, two):
    columns = all(torch.equal(one[1][name], two[1][name]) for name in one[1])
    return columns and (one[0], *one[2:]) == (two[0], *two[2:])


class LifeCycle(RuleBasedStateMachine):
    """The real writer and bank against a model that is nothing but Leyline's table."""

    def __init__(self):
        super().__init__()
        torch.set_num_threads(1)
        self.store = InstantStore(failing=frozenset({"BP-PROJ-LORA"}))
        self.rig = Rig(mlp(), batch(), config={"seeds_per_layer": 2}, store=self.store)
        self.expected = dict.fromkeys(SEEDS, S.DORMANT)
        self.fails = dict.fromkeys(SEEDS, False)
        self.events = 0

    def predict(self, verbs):
        """Return what a batch leads to, or None where the table forbids it."""
        checked = dict(self.expected)
        for verb, seed, _ in verbs:
            if verb not in TRANSITIONS[checked[seed]]:
                return None
            checked[seed] = TARGET[verb]
        states, fails, events, stopped = dict(self.expected), dict(self.fails), 0, set()
        waiting = self.store.patience
        for verb, seed, broken in verbs:
            if seed in stopped:
                continue
            target = TARGET[verb]
            if verb is C.GERMINATE:
                fails[seed] = broken
            if verb in NEEDS_KERNEL and states[seed] is S.LOADING:
                if waiting > 0:
                    waiting -= 1
                    stopped.add(seed)
                    continue
                if fails[seed]:
                    target = S.CULLED
                    stopped.add(seed)
            states[seed], events = target, events + 1
        return states, fails, events

    def apply(self, verbs):
        verbs = sorted(verbs, key=lambda item: SeedId.parse(item[1]))
        blueprint = {True: "BP-PROJ-LORA", False: "BP-NORM-RMS"}
        commands = [
            self.rig.command(v, s, **({"blueprint": blueprint[broken]} if v is C.GERMINATE else {}))
            for v, s, broken in verbs
        ]
        predicted = self.predict(verbs)
        if predicted is None:
            before = snapshot(self.rig)
            with pytest.raises(IllegalTransition):
                self.rig.writer.apply(commands, self.rig.moment())
            assert equal(before, snapshot(self.rig))
            return
        events = self.rig.writer.apply(commands, self.rig.moment())
        self.expected, self.fails, count = predicted
        self.events += count
        assert events == self.rig.events[len(self.rig.events) - count :]

    @rule(verb=st.sampled_from(C), seed=st.sampled_from(SEEDS), broken=st.booleans())
    def anything(self, verb, seed, broken):
        self.apply([(verb, seed, broken)])

    @rule(data=st.data(), seed=st.sampled_from(SEEDS), broken=st.sampled_from([False, False, False, True]))
    def something_allowed(self, data, seed, broken):
        if allowed := sorted(TRANSITIONS[self.expected[seed]]):
            self.apply([(data.draw(st.sampled_from(allowed)), seed, broken)])

    @rule(
        verbs=st.lists(
            st.tuples(st.sampled_from([C.GERMINATE, C.LOAD, C.TRAIN, C.GRAFT, C.CULL]), st.sampled_from(SEEDS)),
            max_size=4,
        )
    )
    def several_at_once(self, verbs):
        self.apply([(verb, seed, False) for verb, seed in verbs])

    @rule(seed=st.sampled_from(SEEDS))
    def the_whole_life(self, seed):
        if self.expected[seed] is S.DORMANT and not self.store.patience:
            self.apply([(verb, seed, False) for verb in PATHS[S.FINE_TUNING]])

    @rule(polls=st.integers(1, 3))
    def kernels_take_their_time(self, polls):
        self.store.patience = polls

    @rule()
    def a_training_step(self):
        self.rig.train(1)
        self.rig.writer.mirror(self.rig.moment())

    @precondition(lambda self: self.rig.bank.records)
    @rule()
    def save_and_load_elsewhere(self):
        state = self.rig.model.state_dict()
        fresh = Rig(mlp(1), batch(), config={"seeds_per_layer": 2}, store=self.store)
        fresh.model.load_state_dict(state)
        assert same_bits(fresh.model(batch()), self.rig.model(batch()))
        fresh.events += self.rig.events
        self.rig = fresh

    @rule(row=st.integers(0, 4), column=st.sampled_from(["lifecycle", "alpha", "kernel_hash", "last_epoch"]))
    def tamper(self, row, column):
        arrays = self.rig.bank.arrays
        before = arrays.columns[column][row].clone()
        arrays.columns[column][row] += 1
        with pytest.raises(StateCorruption):
            arrays.verify()
        arrays.columns[column][row] = before

    @invariant()
    def states_follow_the_table(self):
        assert {seed: self.rig.state(seed) for seed in SEEDS} == self.expected
        recorded = {str(seed): record.state for seed, record in self.rig.bank.records.items()}
        assert recorded == {s: v.value for s, v in self.expected.items() if v is not S.DORMANT}

    @invariant()
    def one_event_for_each_transition(self):
        assert len(self.rig.events) == self.events
        state = dict.fromkeys(SEEDS, S.DORMANT)
        for event in self.rig.events:
            assert event.source is state[event.seed_id]
            assert event.source not in TERMINAL
            state[event.seed_id] = event.target
        assert state == self.expected

    @invariant()
    def children_live_where_the_state_says(self):
        living = {seed for seed, state in self.expected.items() if state in WITH_CHILD}
        assert {str(seed) for seed in self.rig.bank.grafted()} == living
        assert sum(len(layer.grafts) for layer in self.rig.bank.all_layers()) == len(living)

    @invariant()
    def the_checksum_holds(self):
        self.rig.bank.arrays.verify()


LifeCycle.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestLifeCycle = LifeCycle.TestCase


@pytest.mark.parametrize("state", S)
def test_every_state_can_be_reached(rig, state):
    rig.grow("2#0.0", state)
    assert rig.state("2#0.0") is state
    assert [event.target for event in rig.events] == [TARGET[verb] for verb in PATHS[state]]


def test_a_batch_is_all_or_nothing():
    rig = Rig(mlp(), batch(), config={"seeds_per_layer": 2})
    before = snapshot(rig)
    good = rig.command(C.GERMINATE, "0#0.0")
    for bad, error in (
        (rig.command(C.GRAFT, "2#0.0"), IllegalTransition),
        (rig.command(C.GERMINATE, "nowhere#0.0"), NoSuchSeed),
        (rig.command(C.GERMINATE, "2#9.0"), NoSuchSeed),
        (rig.command(C.GERMINATE, "2#0.0", grafting_strategy="slow"), ConfigError),
    ):
        with pytest.raises(error):
            rig.writer.apply([good, bad], rig.moment())
        assert equal(before, snapshot(rig))
        rig.bank.arrays.verify()


def test_commands_are_applied_in_seed_order(rig):
    commands = [rig.command(C.GERMINATE, seed) for seed in ("4#0.0", "2#0.1", "0#0.0", "2#0.0")]
    events = rig.writer.apply(commands, rig.moment(7))
    assert [event.seed_id for event in events] == ["0#0.0", "2#0.0", "2#0.1", "4#0.0"]
    assert {event.step for event in events} == {7}


def test_a_seed_waits_for_its_kernel(rig):
    rig.store.patience = 2
    rig.do(C.GERMINATE, "2#0.0")
    rig.do(C.LOAD, "2#0.0")
    assert rig.do(C.TRAIN, "2#0.0") == []
    assert not rig.writer.kernel_ready(SeedId("2"))
    assert rig.writer.kernel_ready(SeedId("2"))
    assert [event.target for event in rig.do(C.TRAIN, "2#0.0")] == [S.TRAINING]


def test_a_seed_that_must_wait_leaves_its_further_commands_undone(rig):
    rig.grow("2#0.0", S.LOADING)
    rig.grow("4#0.0", S.GERMINATED)
    rig.store.patience = 1
    commands = [rig.command(C.TRAIN, "2#0.0"), rig.command(C.GRAFT, "2#0.0"), rig.command(C.LOAD, "4#0.0")]
    events = rig.writer.apply(commands, rig.moment())
    assert [(event.seed_id, event.target) for event in events] == [("4#0.0", S.LOADING)]
    assert rig.state("2#0.0") is S.LOADING


@pytest.mark.parametrize("blueprint", ["BP-NO-SUCH", "BP-ATTN-STD"])
def test_a_kernel_that_cannot_be_had_culls_the_seed(rig, blueprint):
    rig.do(C.GERMINATE, "2#0.0", blueprint=blueprint)
    rig.do(C.LOAD, "2#0.0")
    assert rig.writer.kernel_ready(SeedId("2"))
    (event,) = rig.do(C.GRAFT, "2#0.0")
    assert (event.target, event.command, event.reason) == (S.CULLED, C.CULL, Reason.KERNEL_LOAD_FAILED)
    assert blueprint in event.detail
    assert rig.bank.records[SeedId("2")].embargo > 0


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KernelError("no")])
def test_a_kernel_that_cannot_be_instantiated_culls_the_seed(error):
    def fail(seed):
        raise error

    rig = Rig(mlp(), batch(), store=InstantStore({"BP-MLP-GELU": fail}))
    rig.grow("2#0.0", S.LOADING)
    (event,) = rig.do(C.TRAIN, "2#0.0")
    assert event.target is S.CULLED
    assert rig.bank.grafted() == {}


@pytest.mark.parametrize(
    ("reason", "steps"),
    [(Reason.GATE_FAILED, 9), (Reason.RUNTIME_ERROR, 9), (Reason.OUTCOMPETED, 0), (Reason.RUN_ENDED, 0)],
)
def test_embargoes(reason, steps):
    rig = Rig(mlp(), batch(), config={"embargo_steps": 9})
    rig.grow("2#0.0")
    rig.cull("2#0.0", reason)
    record = rig.bank.records[SeedId("2")]
    assert record.embargo == steps
    for _ in range(steps):
        assert not stage_complete(record, rig.bank.config, 0.0, False)
        rig.stepper.end(1.0)
    assert stage_complete(record, rig.bank.config, 0.0, False)


@pytest.mark.parametrize("ending", ["cull", "cancel", "roll back"])
def test_a_removed_child_leaves_no_trace(ending):
    rig = Rig(mlp(), batch())
    bare = {name: value.clone() for name, value in rig.model.state_dict().items()}
    wake(rig.grow("2#0.0", S.TRAINING if ending == "cancel" else S.GRAFTING, alpha=1.0))
    rig.writer.mirror(rig.moment())
    assert rig.model.state_dict().keys() != bare.keys()
    assert rig.bank.arrays.columns["kernel_hash"].any()
    verb = {"cull": C.CULL, "cancel": C.CANCEL, "roll back": C.ROLL_BACK}[ending]
    rig.do(verb, "2#0.0", reason=Reason.USER_CANCELLED)
    assert rig.bank.added_parameters() == 0
    arrays = rig.bank.arrays.columns
    assert not arrays["alpha"].any()
    assert not arrays["kernel_hash"].any()
    if ending != "roll back":
        rig.do(C.RELEASE, "2#0.0")
        assert rig.state("2#0.0") is S.DORMANT
        state = rig.model.state_dict()
        assert state.keys() == bare.keys()
        assert all(same_bits(state[name], bare[name]) for name in bare)
    assert same_bits(rig.forward_backward(), mlp()(batch()))
    assert not any(layer.live or layer.grafts for layer in rig.bank.all_layers())


def test_the_arrays_show_what_lives(rig):
    rig.grow("2#0.0", S.GRAFTING, alpha=0.5)
    rig.writer.mirror(rig.moment())
    row, record = rig.bank.rows[SeedId("2")], rig.bank.records[SeedId("2")]
    columns = rig.bank.arrays.columns
    assert float(columns["alpha"][row]) == 0.5
    assert int(columns["kernel_hash"][row]) == short_hash(record.kernel_id) > 0
    assert short_hash("") == 0
    assert sum(map(bool, columns["kernel_hash"])) == 1


def test_a_child_that_may_not_train_never_does():
    store = InstantStore({"BP-MLP-GELU": lambda seed: nn.Linear(8, 8).requires_grad_(False)})
    rig = Rig(mlp(), batch(), store=store)
    rig.grow("2#0.0", S.LOADING)
    real = store.poll
    store.poll = lambda request: _fixed(real(request))
    rig.do(C.GRAFT, "2#0.0")
    graft = rig.bank.graft(SeedId("2"))
    for verb in (C.STABILIZE, C.EVALUATE, C.FOSSILIZE):
        assert not any(p.requires_grad for p in graft.child.parameters())
        rig.do(verb, "2#0.0")


def _fixed(kernel):
    return dataclasses.replace(kernel, ir=kernel.ir.model_copy(update={"trainable": False}))


# --- whole lives -------------------------------------------------------------------------------------------------

CHILD_TRAINS = {
    "measured": dict.fromkeys((S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED), True),
    "strict": {
        S.GRAFTING: True,
        S.STABILIZATION: False,
        S.EVALUATING: False,
        S.FINE_TUNING: True,
        S.FOSSILIZED: False,
    },
}
FORWARD = {
    S.GERMINATED: C.LOAD,
    S.LOADING: C.TRAIN,
    S.TRAINING: C.GRAFT,
    S.GRAFTING: C.STABILIZE,
    S.STABILIZATION: C.EVALUATE,
    S.EVALUATING: C.FINE_TUNE,
    S.FINE_TUNING: C.FOSSILIZE,
}


def short_lives(preset):
    names = ("training_steps", "stabilization_steps", "fine_tuning_steps")
    return {"preset": preset, "ramp_steps": 4} | {name: 3 for name in names if preset == "strict"}


def weights(module):
    return [p.detach().clone() for p in module.parameters()] if module is not None else []


def moved(before, module):
    return not all(map(torch.equal, before, weights(module)))


@pytest.mark.parametrize("preset", ["measured", "strict"])
def test_a_whole_life(preset):
    rig = Rig(mlp(), batch(), config=short_lives(preset) | {"stabilization_steps": 3})
    trains = CHILD_TRAINS[preset] | {S.TRAINING: True}
    rig.do(C.GERMINATE, "2#0.0")
    record, stages = rig.bank.records[SeedId("2")], []
    while (state := rig.state("2#0.0")) in FORWARD:
        graft = rig.bank.graft(SeedId("2"))
        host, child, steps = weights(rig.model.host), weights(graft), 0
        while not stage_complete(record, rig.bank.config, graft.strength if graft else 0.0, state is S.LOADING):
            rig.train(1)
            steps += 1
        stages.append((state, steps))
        assert {p.requires_grad for p in graft.child.parameters()} == {trains[state]} if graft else state not in trains
        assert moved(host, rig.model.host) == (steps > 0), "the host trains throughout"
        assert moved(child, graft) == (steps > 0 and trains.get(state, False))
        rig.do(FORWARD[state], "2#0.0")
    long = 3 if preset == "strict" else 0
    assert [steps for _, steps in stages] == [0, 0, long, 4, 3, 0, long]
    assert [state for state, _ in stages] == list(FORWARD)
    graft = rig.bank.graft(SeedId("2"))
    assert {p.requires_grad for p in graft.child.parameters()} == {trains[S.FOSSILIZED]}
    assert (rig.state("2#0.0"), graft.strength) == (S.FOSSILIZED, 1.0)
    assert record.stage_steps.get("GRAFTING") == 4
    child = weights(graft)
    rig.train(2)
    assert moved(child, graft) == trains[S.FOSSILIZED]


def test_without_training_steps_a_child_goes_straight_to_grafting(rig):
    rig.grow("2#0.0", S.LOADING)
    rig.do(C.GRAFT, "2#0.0")
    assert rig.bank.graft(SeedId("2")).objective == "graft"


def test_drift_is_measured_only_while_grafting(rig):
    rig.grow("2#0.0", S.GRAFTING, grafting_strategy="drift_controlled")
    graft = rig.bank.graft(SeedId("2"))
    assert graft.reference is not None
    rig.do(C.STABILIZE, "2#0.0")
    assert graft.reference is None
    assert not any("reference" in key for key in rig.model.state_dict())


def test_a_refused_site_cannot_germinate(rig):
    rig.bank.layer("2").refusal = "its output is odd"
    with pytest.raises(SiteError, match="its output is odd"):
        rig.do(C.GERMINATE, "2#0.0")
