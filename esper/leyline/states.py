"""The life cycle of a seed: its states, the commands that move it, and the one transition table.

```
DORMANT -> GERMINATED -> LOADING -> TRAINING -> GRAFTING -> STABILIZATION -> EVALUATING -> FINE_TUNING -> FOSSILIZED
```

Every active state may also end in CULLED, CANCELLED or ROLLED_BACK as the table says.
States are nouns, commands are verbs, and each command leads to exactly one state.
"""

from enum import StrEnum, unique
from types import MappingProxyType

from esper.leyline.errors import IllegalTransition


@unique
class SeedState(StrEnum):
    """Where a seed is in its life. The order is the order of `SEED_STATE_CODES`."""

    DORMANT = "DORMANT"
    GERMINATED = "GERMINATED"
    LOADING = "LOADING"
    TRAINING = "TRAINING"
    GRAFTING = "GRAFTING"
    STABILIZATION = "STABILIZATION"
    EVALUATING = "EVALUATING"
    FINE_TUNING = "FINE_TUNING"
    FOSSILIZED = "FOSSILIZED"
    CULLED = "CULLED"
    CANCELLED = "CANCELLED"
    ROLLED_BACK = "ROLLED_BACK"


@unique
class SeedCommand(StrEnum):
    """What may be asked of a seed. Each names the state that it leads to."""

    GERMINATE = "GERMINATE"
    LOAD = "LOAD"
    TRAIN = "TRAIN"
    GRAFT = "GRAFT"
    STABILIZE = "STABILIZE"
    EVALUATE = "EVALUATE"
    FINE_TUNE = "FINE_TUNE"
    FOSSILIZE = "FOSSILIZE"
    CULL = "CULL"
    CANCEL = "CANCEL"
    ROLL_BACK = "ROLL_BACK"
    RELEASE = "RELEASE"


@unique
class Reason(StrEnum):
    """Why a transition happened. Every removal, stop and rejection carries one."""

    REQUESTED = "REQUESTED"
    SLOT_FREE = "SLOT_FREE"
    KERNEL_READY = "KERNEL_READY"
    KERNEL_LOAD_FAILED = "KERNEL_LOAD_FAILED"
    STAGE_COMPLETE = "STAGE_COMPLETE"
    RAMP_COMPLETE = "RAMP_COMPLETE"
    GATE_PASSED = "GATE_PASSED"
    GATE_FAILED = "GATE_FAILED"
    OUTCOMPETED = "OUTCOMPETED"
    RUNTIME_ERROR = "RUNTIME_ERROR"
    OVER_BUDGET = "OVER_BUDGET"
    USER_CANCELLED = "USER_CANCELLED"
    RUN_ENDED = "RUN_ENDED"
    EMBARGO_OVER = "EMBARGO_OVER"
    EMERGENCY = "EMERGENCY"


SEED_STATE_CODES = MappingProxyType({state: code for code, state in enumerate(SeedState)})
"""State to the uint8 code that is stored in state arrays; part of the wire format."""

TARGET = MappingProxyType(
    {
        SeedCommand.GERMINATE: SeedState.GERMINATED,
        SeedCommand.LOAD: SeedState.LOADING,
        SeedCommand.TRAIN: SeedState.TRAINING,
        SeedCommand.GRAFT: SeedState.GRAFTING,
        SeedCommand.STABILIZE: SeedState.STABILIZATION,
        SeedCommand.EVALUATE: SeedState.EVALUATING,
        SeedCommand.FINE_TUNE: SeedState.FINE_TUNING,
        SeedCommand.FOSSILIZE: SeedState.FOSSILIZED,
        SeedCommand.CULL: SeedState.CULLED,
        SeedCommand.CANCEL: SeedState.CANCELLED,
        SeedCommand.ROLL_BACK: SeedState.ROLLED_BACK,
        SeedCommand.RELEASE: SeedState.DORMANT,
    }
)
"""The state that each command leads to."""

_S, _C = SeedState, SeedCommand
TRANSITIONS = MappingProxyType(
    {
        _S.DORMANT: frozenset({_C.GERMINATE}),
        _S.GERMINATED: frozenset({_C.LOAD, _C.CANCEL}),
        _S.LOADING: frozenset({_C.TRAIN, _C.GRAFT, _C.CULL, _C.ROLL_BACK}),
        _S.TRAINING: frozenset({_C.GRAFT, _C.CULL, _C.CANCEL, _C.ROLL_BACK}),
        _S.GRAFTING: frozenset({_C.STABILIZE, _C.CULL, _C.ROLL_BACK}),
        _S.STABILIZATION: frozenset({_C.EVALUATE, _C.ROLL_BACK}),
        _S.EVALUATING: frozenset({_C.FINE_TUNE, _C.FOSSILIZE, _C.CULL, _C.ROLL_BACK}),
        _S.FINE_TUNING: frozenset({_C.FOSSILIZE, _C.CULL, _C.ROLL_BACK}),
        _S.FOSSILIZED: frozenset(),
        _S.CULLED: frozenset({_C.RELEASE}),
        _S.CANCELLED: frozenset({_C.RELEASE}),
        _S.ROLLED_BACK: frozenset(),
    }
)
"""The one transition table: the commands that each state accepts."""

TERMINAL = frozenset(state for state, commands in TRANSITIONS.items() if not commands)
"""States without an exit: FOSSILIZED and ROLLED_BACK."""

WITH_CHILD = frozenset({_S.TRAINING, _S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING, _S.FOSSILIZED})
"""States in which a child network lives in the seed's slot."""

IN_PROGRESS = frozenset(
    {_S.GERMINATED, _S.LOADING, _S.TRAINING, _S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING}
)
"""States that count as an adaptation under way."""


def next_state(state: SeedState, command: SeedCommand) -> SeedState:
    """Return the state that `command` leads to from `state`.

    Raises:
        IllegalTransition: the table does not allow the command in this state.

    Example:
        >>> next_state(SeedState.DORMANT, SeedCommand.GERMINATE).value
        'GERMINATED'
    """
    if command not in TRANSITIONS[state]:
        raise IllegalTransition(state, command, sorted(TRANSITIONS[state]))
    return TARGET[command]
