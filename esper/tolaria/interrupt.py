"""Signals during a fit: the step under way is finished, a checkpoint is written, and the process says so and ends."""

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

FILE = "interrupted.ckpt"
"""Name of the checkpoint of an interrupted run, beside the run's other checkpoints."""

_EXIT = 128
"""Added to a signal's number it is the exit status by which shells tell what ended a process."""

_NOTIFIER = "_sigterm_notifier_fn"
"""Lightning's handler of SIGTERM, a method of its signal connector."""


class Interruption:
    """Ends one fit in order when the process is asked to stop.

    SIGTERM is Lightning's: it raises `SIGTERMException` once a batch, and the validation after it, are done. SIGINT
    (Ctrl-C) would raise in the middle of a step; it is made to end the fit in the same place. A second Ctrl-C stops
    at once, without a checkpoint.

    With several processes SIGINT stays as it is, and SIGTERM is only noted: Lightning's own handler would send a
    message to the other ranks from within the handler, which meets whatever they are waiting for. The ranks tell each
    other after a batch, and then end in the same place.

    Attributes:
        noted: whether this process of several has received SIGTERM.
    """

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._asked = signal.SIGTERM
        self._watching = False
        self._connector: Any = None
        self.noted = False

    def prepare(self, trainer: Trainer) -> None:
        """With several processes, before Lightning sets its handlers: let that of SIGTERM take a note only."""
        self.noted = False
        if trainer.world_size > 1 and self._connector is None:
            self._connector = trainer._signal_connector
            vars(self._connector)[_NOTIFIER] = self._note

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True

    def watch(self, trainer: Trainer) -> None:
        """Take over Ctrl-C, unless somebody else handles it already."""
        self._asked = signal.SIGTERM
        plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not plain or trainer.world_size > 1 or threading.current_thread() is not threading.main_thread():
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self.release()
            self._asked = signal.SIGINT
            trainer._signal_connector.received_sigterm = True
            _tell("Ctrl-C: this step is finished first, and a validation after it. Again Ctrl-C stops at once.")

        signal.signal(signal.SIGINT, stop)
        self._watching = True

    def release(self) -> None:
        """Give the signals back; may be called twice."""
        if self._connector is not None:
            vars(self._connector).pop(_NOTIFIER, None)
            self._connector = None
        if self._watching:
            self._watching = False
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def conclude(self, trainer: Trainer, error: BaseException) -> None:
        """In `on_exception`: save where that is possible, and say what was done.

        A checkpoint is written only where the loop itself has stopped between two batches.
        """
        if isinstance(error, SIGTERMException):
            error.code = _EXIT + self._asked
            saved = _save(trainer)
            what = f"{signal.Signals(self._asked).name}: the run ends after step {trainer.global_step}"
            _tell(f"{what}; {_how_to_go_on(saved)}")
        elif isinstance(error, KeyboardInterrupt):
            _tell("stopped in the middle of a step, where nothing can be saved; resume from the last checkpoint.")


def _how_to_go_on(saved: Path | None) -> str:
    if saved is None:
        return "no checkpoint was written, because the trainer keeps none."
    return f"it is saved in {saved}. Resume with resume=auto and the same folder, or with ckpt_path={str(saved)!r}."


def _save(trainer: Trainer) -> Path | None:
    """Write a checkpoint beside the others; another callback may already do so in its own place."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, OnExceptionCheckpoint):
            return Path(callback.ckpt_path)
    keeper = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath), None)
    if keeper is None or keeper.dirpath is None:
        return None
    path = Path(keeper.dirpath) / FILE
    trainer.save_checkpoint(path)
    return path


@rank_zero_only
def _tell(message: str) -> None:
    print(f"\nEsper: {message}", file=sys.stderr, flush=True)
