"""The transition table says what the design says, and nothing that only uses it can leave it."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from esper.leyline import SeedTransitioned
from esper.leyline.errors import ContractError, IllegalTransition
from esper.leyline.states import (
    IN_PROGRESS,
    SEED_STATE_CODES,
    TARGET,
    TERMINAL,
    TRANSITIONS,
    WITH_CHILD,
    Reason,
    SeedCommand,
    SeedState,
    next_state,
)

# One line per line of the design's table; ROLLED_BACK is its row "any of LOADING..FINE_TUNING". The one addition:
DESIGN = {
    "DORMANT": "GERMINATED",
    "GERMINATED": "LOADING CANCELLED",
    "LOADING": "TRAINING GRAFTING CULLED ROLLED_BACK",
    "TRAINING": "GRAFTING CULLED CANCELLED ROLLED_BACK",
    "GRAFTING": "STABILIZATION CULLED ROLLED_BACK",
    "STABILIZATION": "EVALUATING ROLLED_BACK",
    "EVALUATING": "FINE_TUNING FOSSILIZED CULLED ROLLED_BACK",
    "FINE_TUNING": "FOSSILIZED CULLED ROLLED_BACK",
    "FOSSILIZED": "",
    "CULLED": "DORMANT",
    "CANCELLED": "DORMANT",
    "ROLLED_BACK": "",
}


def reach(start: SeedState) -> set[SeedState]:
    """Return every state that can follow `start`, however many commands later."""
    seen: set[SeedState] = set()
    todo = [start]
    while todo:
        todo += (found := {TARGET[command] for command in TRANSITIONS[todo.pop()]} - seen)
        seen |= found
    return seen


@pytest.mark.parametrize("state", SeedState)
def test_table_is_the_designs(state: SeedState) -> None:
    """Each state leads where its line of the design says."""
    assert {TARGET[command] for command in TRANSITIONS[state]} == set(DESIGN[state].split())


def test_tables_cover_every_state_and_command() -> None:
    """No state and no command is missing from, or foreign to, any table."""
    assert set(TRANSITIONS) == set(SEED_STATE_CODES) == set(SeedState) == set(DESIGN)
    assert set(TARGET) == set(SeedCommand)
    assert set(TARGET.values()) == set(SeedState)
    assert len(TARGET) == len(set(TARGET.values())), "each state has one command"


def test_state_codes_are_pinned() -> None:
    """The codes are part of the wire format: they may grow, not move."""
    assert [SEED_STATE_CODES[SeedState(name)] for name in DESIGN] == list(range(12))


def test_terminal_states_have_no_exits() -> None:
    """FOSSILIZED and ROLLED_BACK accept nothing."""
    assert {SeedState.FOSSILIZED, SeedState.ROLLED_BACK} == TERMINAL
    assert all(reach(state) == set() for state in TERMINAL)


def test_every_state_is_reached_from_dormant() -> None:
    """No state is decoration."""
    assert reach(SeedState.DORMANT) == set(SeedState)


@pytest.mark.parametrize("state", sorted(IN_PROGRESS))
def test_no_adaptation_is_a_trap(state: SeedState) -> None:
    """Every adaptation under way can be given up, and can also succeed."""
    after = {TARGET[command] for command in TRANSITIONS[state]}
    # STABILIZATION has no way out of its own: it ends through EVALUATING.
    if state is SeedState.STABILIZATION:
        after |= {TARGET[command] for command in TRANSITIONS[SeedState.EVALUATING]}
    assert after & {SeedState.CULLED, SeedState.CANCELLED}
    assert SeedState.FOSSILIZED in reach(state)


def test_a_child_lives_from_training_on() -> None:
    """The states with a child are those in which one could compute."""
    assert {*IN_PROGRESS, SeedState.FOSSILIZED} - {SeedState.GERMINATED, SeedState.LOADING} == WITH_CHILD


def test_an_illegal_command_names_what_is_allowed() -> None:
    """The error says the state, the command and the way out."""
    with pytest.raises(IllegalTransition, match=r"GRAFT is not allowed in state DORMANT; allowed: GERMINATE\."):
        next_state(SeedState.DORMANT, SeedCommand.GRAFT)
    with pytest.raises(ContractError, match="terminal"):
        next_state(SeedState.FOSSILIZED, SeedCommand.CULL)


def test_tables_are_read_only() -> None:
    """Nobody can add a transition at run time."""
    with pytest.raises(TypeError):
        TRANSITIONS[SeedState.FOSSILIZED] = frozenset({SeedCommand.CULL})  # type: ignore[index]
    with pytest.raises(AttributeError):
        TRANSITIONS[SeedState.FOSSILIZED].add(SeedCommand.CULL)  # type: ignore[attr-defined]


class SeedMachine(RuleBasedStateMachine):
    """Three seeds that obey any command the table allows, and write one event for each move."""

    def __init__(self) -> None:
        """Start with dormant seeds."""
        super().__init__()
        self.states = dict.fromkeys("abc", SeedState.DORMANT)
        self.events: list[SeedTransitioned] = []
        self.moves = 0

    @rule(seed=st.sampled_from("abc"), command=st.sampled_from(SeedCommand), reason=st.sampled_from(Reason))
    def command_anything(self, seed: str, command: SeedCommand, reason: Reason) -> None:
        """Give a random command; a refused one must change nothing."""
        before = self.states[seed]
        try:
            after = next_state(before, command)
        except IllegalTransition:
            assert TARGET[command].value not in DESIGN[before].split()
            return
        assert after.value in DESIGN[before].split()
        self._move(seed, command, reason)

    @rule(seed=st.sampled_from("abc"), pick=st.integers(0, 11))
    def command_something_legal(self, seed: str, pick: int) -> None:
        """Give a legal command, so that long lives are explored too."""
        if legal := sorted(TRANSITIONS[self.states[seed]]):
            self._move(seed, legal[pick % len(legal)], Reason.REQUESTED)

    def _move(self, seed: str, command: SeedCommand, reason: Reason) -> None:
        source = self.states[seed]
        target = self.states[seed] = next_state(source, command)
        move = {"source": source, "target": target, "command": command, "reason": reason}
        self.events.append(SeedTransitioned(run_id="r", epoch=0, step=self.moves, seed_id=seed, **move))
        self.moves += 1

    @invariant()
    def one_event_per_move(self) -> None:
        """The journal has each move once, and replays to the present states."""
        assert [event.step for event in self.events] == list(range(self.moves))
        replay = dict.fromkeys("abc", SeedState.DORMANT)
        for event in self.events:
            assert replay[event.seed_id] is event.source
            assert event.source not in TERMINAL
            replay[event.seed_id] = event.target
        assert replay == self.states


TestSeedMachine = SeedMachine.TestCase
TestSeedMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
