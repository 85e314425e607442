"""Saves and restores what lies between two boundaries, so that a resumed run is the uninterrupted one, bit for bit."""

from collections.abc import Mapping
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from esper.kasmina.bank import SeedBank
from esper.leyline.ids import SeedId
from esper.tamiyo.boundary import Boundary
from esper.tamiyo.journal import Journal
from esper.tolaria.continuation import Continuation, loop_state
from esper.tolaria.interrupt import Interruption
from esper.tolaria.pause import TORN, Pause, Whereabouts
from esper.tolaria.seeds_state import restore_seeds, seeds_state


@final
class Resumption:
    """The part of the callback that knows where a fit stands, and how it goes on from a checkpoint."""

    def __init__(self) -> None:
        """Start with a fit that resumes from nothing."""
        self.whereabouts, self.interruption = Whereabouts(), Interruption()
        self._continuation: Continuation | None = None
        self._saved: Mapping[str, Any] = {}
        self._cursor: dict[str, Any] | None = None

    @property
    def cursor(self) -> Mapping[str, Any] | None:
        """Where the journal of the resumed run stood; None for a fresh run."""
        found: Mapping[str, Any] | None = self._saved.get("journal")
        return found

    @property
    def has_stepped(self) -> bool:
        """Whether the resumed run had made a step."""
        return self._continuation is not None and self._continuation.step > 0

    def save(
        self, trainer: Trainer, module: LightningModule, bank: SeedBank, boundary: Boundary | None
    ) -> dict[str, Any]:
        """Return what a checkpoint that is written now must hold beside weights and optimizer."""
        pause = self.whereabouts.pause(trainer)
        if pause is Pause.TORN and boundary is not None:
            rank_zero_warn(f"Esper: the checkpoint that is being written cannot be resumed: it {TORN}")
        state = loop_state(trainer, module, pause) | {"seeds": seeds_state(bank)}
        state |= {"random": random} if (random := self.whereabouts.random(trainer, pause)) is not None else {}
        return state | {"measured": [str(seed) for seed in boundary.measured] if boundary is not None else []}

    def journal(self, journal: Journal | None, run_id: str) -> dict[str, Any]:
        """Return the entry of a checkpoint that says where the journal stands; on the rank that writes it."""
        if journal is not None:
            self._cursor = journal.cursor(run_id)
        return {"journal": self._cursor} if self._cursor is not None else {}

    def load(self, checkpoint: dict[str, Any], own: Mapping[str, Any]) -> None:
        """Take what a checkpoint holds; Lightning's counters in it are put in order.

        Args:
            checkpoint: what Lightning read.
            own: this rank's own part of it, if the run has several.

        Raises:
            CheckpointError: the checkpoint was written in the middle of a step.
        """
        entry = checkpoint.get("esper")
        if entry is not None:
            self._saved = {**entry["run"], **own.get("run", {})}
            self._continuation = Continuation(checkpoint, self._saved)

    def fit_start(self, trainer: Trainer, bank: SeedBank, boundary: Boundary) -> None:
        """Before Lightning's loop: restore the seeds, and let the loop be entered."""
        self._cursor = None
        if "seeds" in self._saved:
            restore_seeds(bank, self._saved["seeds"])
        boundary.measured = [SeedId.parse(name) for name in self._saved.get("measured", ())]
        if self._continuation is not None:
            self._continuation.lift_limits(trainer)

    def train_start(self, trainer: Trainer, module: LightningModule, random: dict[str, Any] | None) -> None:
        """Go to the place where the checkpoint was written, and watch for signals from here on."""
        decided = self._continuation is None or self._continuation.pause is not Pause.STEP
        if self._continuation is not None:
            self._continuation.start(trainer, module, self._saved.get("random", random))
        self._continuation, self._saved = None, {}
        self.whereabouts.start(trainer, decided=decided)
        self.interruption.watch(trainer)

    def failed(self, trainer: Trainer, error: BaseException) -> None:
        """End an interrupted fit in order."""
        # Lightning also stops between two batches of a validation, which then is still to be done.
        self.whereabouts.iterated = isinstance(error, SIGTERMException) and not trainer.validating
        self.interruption.conclude(trainer, error)

    def release(self) -> None:
        """Let go of the signals."""
        self.interruption.release()
