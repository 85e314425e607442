"""When a stage has done its work. Pure functions of a seed's record and the settings."""

from esper.kasmina.config import KasminaConfig
from esper.kasmina.record import SeedRecord
from esper.leyline.states import SeedState

_S = SeedState


def stage_complete(record: SeedRecord, config: KasminaConfig, alpha: float, kernel_ready: bool) -> bool:
    """Return whether the seed may be asked to leave its present stage.

    Args:
        record: the adaptation.
        config: durations in training steps.
        alpha: the child's present alpha in [0, 1].
        kernel_ready: whether the store answers for the seed's kernel.
    """
    durations = {
        _S.GERMINATED: 0,
        _S.TRAINING: config.training_steps,
        _S.STABILIZATION: config.stabilization_steps,
        _S.EVALUATING: 0,
        _S.FINE_TUNING: config.fine_tuning_steps,
        _S.CULLED: record.embargo,
        _S.CANCELLED: 0,
    }
    state = SeedState(record.state)
    if state is _S.LOADING:
        return kernel_ready
    if state is _S.GRAFTING:
        return alpha >= 1.0
    return state in durations and record.steps_in_stage >= durations[state]
