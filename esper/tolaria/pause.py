"""Where in a run a checkpoint was written, and the loop counters from which that place goes on exactly.

Lightning itself leaves things out when it resumes: the validation that a step's checkpoint was written before, the end
of an epoch whose last step was saved, the update of plateau schedulers, and, with `max_steps`, it repeats the end of
an epoch. So the counters are put into a plain state here, and `continuation` carries out what is still owed.
"""

from enum import StrEnum, unique
from typing import Any

from lightning.pytorch import Trainer

from esper.tolaria.random_state import random_state

_TRACKED = ("ready", "started", "processed", "completed")
_BATCH, _EPOCH = "epoch_loop.batch_progress", "epoch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"


TORN = (
    "was written in the middle of a training step, where weights, optimizer and counters do not belong together; "
    "use another checkpoint. A callback that saves in `on_train_batch_end` must be listed behind Tamiyo."
)
"""Why a checkpoint cannot be resumed; follows its name."""


@unique
class Pause(StrEnum):
    """How far a run had come when its checkpoint was written."""

    STEP = "STEP"
    """A step is done; its validation, if one is due, is not."""
    BOUNDARY = "BOUNDARY"
    """A step and the validation after it are done, and growth was decided on."""
    ITERATION = "ITERATION"
    """Nothing of the step is left: the next one begins."""
    EPOCH = "EPOCH"
    """Between two epochs, or before the first."""
    END = "END"
    """The run had come to its end."""
    TORN = "TORN"
    """In the middle of a step: weights, optimizer and counters do not belong together."""


class Whereabouts:
    """Follows a fit closely enough to tell, at any moment, what kind of pause it would be.

    Lightning's own counters do not say whether growth was decided at a boundary, or whether a step was counted.
    """

    def __init__(self) -> None:
        """Start before the first step."""
        self._counted, self._decided, self.iterated, self.ended = -1, -1, False, False
        self._before_validation: dict[str, Any] | None = None

    def start(self, trainer: Trainer, *, decided: bool) -> None:
        """Note where the fit starts, and whether what is due there was decided."""
        self._counted = _batches(trainer)
        self._decided = self._counted if decided else -1
        self.iterated = self.ended = False

    def step_begun(self) -> None:
        """Note the start of a step."""
        self.iterated = False

    def step_counted(self, trainer: Trainer) -> None:
        """Note that the seeds have counted the step; before a validation, also the random state."""
        self._counted = _batches(trainer)
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        due = fetcher is not None and loop._should_check_val_fx(fetcher)
        self._before_validation = random_state() if due else None

    def boundary_done(self, trainer: Trainer) -> None:
        """Note that growth was decided on after the step."""
        self._decided = _batches(trainer)

    def random(self, trainer: Trainer, pause: Pause) -> dict[str, Any] | None:
        """Return the random state to go on with, where it is not that of the moment.

        A validation that was cut short is done again from its beginning, and its loaders may draw.
        """
        return self._before_validation if pause is Pause.STEP and trainer.validating else None

    def pause(self, trainer: Trainer) -> Pause:
        """Return what kind of pause this moment is."""
        fit = trainer.fit_loop
        epoch, batch = fit.epoch_progress.current, fit.epoch_loop.batch_progress.current
        if self.ended:
            return Pause.END
        if epoch.started == epoch.processed:  # type: ignore[attr-defined]
            return Pause.EPOCH
        if batch.ready != batch.processed or self._counted != _batches(trainer):  # type: ignore[attr-defined]
            return Pause.TORN
        if self.iterated:
            return Pause.ITERATION
        return Pause.BOUNDARY if self._decided == _batches(trainer) else Pause.STEP


def _batches(trainer: Trainer) -> int:
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


def pause_of(loops: dict[str, Any]) -> Pause:
    """Return the pause that Lightning's counters alone tell of, for a checkpoint that does not name it."""
    epoch, batch = loops[_EPOCH]["current"], loops[_BATCH]["current"]
    if epoch["started"] == epoch["processed"]:
        return Pause.EPOCH
    if batch["ready"] != batch["processed"]:
        return Pause.TORN
    return Pause.STEP if batch["completed"] < batch["processed"] else Pause.BOUNDARY


def owes_epoch_end(loops: dict[str, Any]) -> bool:
    """Return whether the checkpoint was written among the hooks of an epoch's end, before its last accounts."""
    current = loops[_EPOCH]["current"]
    return bool(current["completed"] < current["processed"])


def epoch_was_full(loops: dict[str, Any]) -> bool:
    """Return whether the epoch ended with its last batch, and not because the run was stopped."""
    return bool(loops[_BATCH]["is_last_batch"])


def settle(loops: dict[str, Any], pause: Pause) -> None:
    """Change Lightning's counters, as a checkpoint holds them, to those of a run that rests at the pause.

    Args:
        loops: `checkpoint["loops"]["fit_loop"]`; changed in place.
        pause: where the checkpoint was written.
    """
    for span in ("total", "current"):
        _finish(loops[_BATCH][span])
        _finish(loops[_VALIDATION][span], of="completed")
    _clear(loops[_VALIDATION])
    if pause in (Pause.EPOCH, Pause.END):
        for span in ("total", "current"):
            _finish(loops[_EPOCH][span])
        _clear(loops[_BATCH])


def _finish(tracker: dict[str, int], of: str = "processed") -> None:
    tracker.update(dict.fromkeys(_TRACKED, tracker[of]))


def _clear(progress: dict[str, Any]) -> None:
    progress["current"].update(dict.fromkeys(_TRACKED, 0))
    progress["is_last_batch"] = False
