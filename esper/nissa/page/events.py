"""What went wrong in a run and what was done about it, and which compiled kernels it took."""

from esper.leyline.events import GraftFaulted, RolledBack, RunEvent, SeedTransitioned
from esper.leyline.states import Reason, SeedState
from esper.nissa.chronicle import Chronicle

Row = tuple[str, str, str, str]
"""Step, what happened, where, and the detail."""

_TROUBLE = {Reason.KERNEL_LOAD_FAILED, Reason.RUNTIME_ERROR, Reason.EMERGENCY, Reason.OVER_BUDGET}


def system_events(chronicle: Chronicle) -> list[Row]:
    """Return faults, rollbacks, kernels that failed to load, and compiled kernels that were taken, in order."""
    return [row for event in chronicle.of(RunEvent) if (row := _row(event)) is not None]


def _row(event: RunEvent) -> Row | None:
    step = f"{event.step:,}"
    if isinstance(event, GraftFaulted):
        return step, f"child failed: {words(event.fault)}", event.seed_id, event.detail
    if isinstance(event, RolledBack):
        back = f"went back to step {event.restored_step:,}: {words(event.trigger)}"
        return step, back, ", ".join(event.locked_seeds) or "the run", event.detail
    if not isinstance(event, SeedTransitioned):
        return None
    if event.reason in _TROUBLE:
        return step, f"{words(event.target)}: {words(event.reason)}", event.seed_id, event.detail
    loaded = event.source is SeedState.LOADING and event.kernel_artifact_id
    if loaded and "-eager-" not in event.kernel_artifact_id:
        return step, "compiled kernel taken", event.seed_id, event.kernel_artifact_id
    return None


def words(name: str) -> str:
    """Return an enum's name for people.

    Example:
        >>> words(Reason.KERNEL_LOAD_FAILED)
        'kernel load failed'
    """
    return str(name).lower().replace("_", " ")
