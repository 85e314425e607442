"""Going back in the middle of a fit: when, to which snapshot, and what becomes of the seed that was under way."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.record import SeedRecord
from esper.kasmina.steps import SeedStepper
from esper.kasmina.writer import Moment
from esper.leyline.commands import AdaptationSignal
from esper.leyline.errors import RollbackError, StateCorruption
from esper.leyline.events import RollbackTrigger, RolledBack
from esper.leyline.ids import SeedId
from esper.leyline.states import IN_PROGRESS, TRANSITIONS, Reason, SeedCommand, SeedState
from esper.tamiyo import gate
from esper.tamiyo.boundary import Boundary
from esper.tamiyo.config import RollbackConfig, steps_of
from esper.tolaria.interrupt import Interruption
from esper.tolaria.rollback import FitSnapshot, SnapshotWindow, is_sound
from esper.tolaria.triggers import GO_ON, LossSpike, NonFiniteLoss, Trigger, trigger_of, verdict_of

_log = logging.getLogger(__name__)
_Records = dict[SeedId, SeedRecord]
_S, _C = SeedState, SeedCommand
_LOCKABLE = frozenset(state for state, commands in TRANSITIONS.items() if _C.ROLL_BACK in commands)


class Emergency:
    """Watches a fit, keeps its last good snapshots, and takes it back to one when something goes wrong.

    The decision is one integer a batch, of which the ranks act upon the largest; each rank has snapshots of its own.

    Args:
        boundary: the boundaries of the fit.
        stepper: follows its steps.
        config: window and triggers.
        interruption: knows whether this process was asked to stop.

    Attributes:
        due: whether a snapshot will be taken before the next batch.
    """

    def __init__(
        self, boundary: Boundary, stepper: SeedStepper, config: RollbackConfig, interruption: Interruption
    ) -> None:
        """Take the first snapshot before the first batch."""
        self.boundary, self.stepper, self.config, self.interruption = boundary, stepper, config, interruption
        self.trainer, self.controller, self.tally = boundary.trainer, boundary.controller, boundary.tally
        self.bank, self.ranks = boundary.attachment.bank, boundary.council.ranks
        self.window = SnapshotWindow(config.window, config.memory_gb)
        self.triggers = triggers_of(config)
        self.due = True

    # --- snapshots ----------------------------------------------------------------------------------------------

    def before_batch(self, moment: Moment, batch_idx: int) -> None:
        """Take the snapshot that is due since the last boundary, unless the fit is not well.

        Only now everything that follows a boundary has been done. It waits while gradients are accumulated, and after a
        rollback until the fault could have come back: or faults in every batch would find a new snapshot for ever.
        """
        if not (self.due and self.config.window) or batch_idx % self.trainer.accumulate_grad_batches:
            return
        if self.window.relapses(moment.step, self.config.relapse_steps):
            return
        self.due = False
        if not self.ranks.any(not self._is_well()):
            self.window.add(self._snapshot(moment))

    def _is_well(self) -> bool:
        last = self.tally.history[-1] if self.tally.history else {}
        losses = torch.tensor([last.get("train_loss", 0.0), last.get("decision_loss", 0.0)])
        building_up = any(isinstance(trigger, LossSpike) and not trigger.calm for trigger in self.triggers)
        return bool(losses.isfinite().all()) and not building_up and self._is_sealed() and is_sound(self.trainer)

    def _is_sealed(self) -> bool:
        try:
            self.bank.arrays.verify()
        except StateCorruption:
            return False
        return True

    def _snapshot(self, moment: Moment) -> FitSnapshot:
        memory = {
            "controller": self.controller.memory(),
            "steps": self.stepper.state_dict(),
            "tally": self.tally.state_dict(),
            "triggers": [trigger.state_dict() for trigger in self.triggers],
        }
        return FitSnapshot(
            self.trainer,
            epoch=moment.epoch,
            step=moment.step,
            memory=memory,
            keep_on=self.config.keep_on,
            earlier=self.window.newest,
        )

    # --- triggers -----------------------------------------------------------------------------------------------

    def after_batch(self, outputs: Any, moment: Moment) -> bool:
        """Return whether the run has gone back because of this batch."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        request = self.controller.take_rollback_request()
        found = [GO_ON] if request is None else [verdict_of(RollbackTrigger.REQUESTED)]
        if isinstance(loss, Tensor) and self.config.window:
            value = float(loss.detach())
            found += [verdict_of(trigger.kind) for trigger in self.triggers if trigger.observe(value)]
        return self._act(max(found), moment, request or f"the loss of a batch was {loss}")

    def before_boundary(self, moment: Moment) -> bool:
        """Return whether the run has gone back because the seeds' state failed its checksum."""
        if not self.config.window:
            return False
        verdict = GO_ON if self._is_sealed() else verdict_of(RollbackTrigger.STATE_CORRUPTION)
        return self._act(verdict, moment, "the seeds' state failed its checksum")

    def after_boundary(self, signal: AdaptationSignal, moment: Moment) -> bool:
        """Note that a snapshot is due; return whether the run has gone back because of Tamiyo's signal."""
        self.due = True
        asked = signal.emergency_rollback_required
        return self._act(verdict_of(RollbackTrigger.REQUESTED) if asked else GO_ON, moment, signal.reason)

    def _act(self, verdict: int, moment: Moment, detail: str) -> bool:
        worst, stop = self.ranks.maximum([verdict, int(self.trainer.received_sigterm or self.interruption.noted)])
        if stop:  # All ranks must leave the loop in the same place, to save together.
            self.trainer._signal_connector.received_sigterm = True
        if worst == GO_ON:
            return False
        # What is told must be the words of a rank on which it happened.
        detail = next(words for found, words in self.ranks.gather([verdict, detail]) if found == worst)
        # All ranks must blame the same seed.
        self.boundary.council.faults()
        # Boundaries lie inside validation's inference mode, and what is put back must be trained.
        with torch.inference_mode(False), torch.enable_grad():
            self._go_back(trigger_of(worst), moment, detail)
        self.boundary.council.faults.forget()
        return True

    # --- the way back -------------------------------------------------------------------------------------------

    def _go_back(self, trigger: RollbackTrigger, moment: Moment, detail: str) -> None:
        snapshot = self.window.take(moment.step, self.config.relapse_steps)
        if snapshot is None:
            raise _nothing_left(trigger, detail, self.config.window)
        under_way = self._under_way()
        failed = {seed for seed in under_way if _has_failed(self.bank.graft(seed))}
        locked = [deepcopy(r) for r in self.bank.records.values() if r.state == _S.ROLLED_BACK.value]
        self._restore(snapshot, moment)
        self.due = False
        known = self._under_way()
        # Nothing may be under way any more: a boundary inside the fault has ended it, and is undone now.
        new = {seed: record for seed, record in known.items() if _named(record) not in self._ended()}
        guilty = _guilty(under_way, failed) or _guilty(new, failed)
        said = f"{detail}; back to the snapshot of step {snapshot.step}, {len(self.window)} in the window"
        self.controller.tell(
            RolledBack(
                run_id=moment.run_id,
                epoch=moment.epoch,
                step=moment.step,
                trigger=trigger,
                restored_epoch=snapshot.epoch,
                restored_step=snapshot.step,
                locked_seeds=(str(guilty),) if guilty is not None else (),
                detail=said,
            )
        )
        _log.warning("%s at step %d: %s.", trigger, moment.step, said)
        for record in locked:
            self.bank.impose(record)
        self._end(guilty, known, under_way, moment)
        if guilty in failed:
            self.controller.store.evict(under_way[guilty].kernel_id)
        self.boundary.follow()
        self.controller.refetch()

    def _ended(self) -> set[tuple[str, str, str]]:
        """Return the adaptations that an emergency has ended; snapshots from before it know them as under way."""
        reports = (r for r in self.controller.reports if r.reason is Reason.EMERGENCY)
        return {(r.seed_id, r.group, r.blueprint_id) for r in reports}

    def _under_way(self) -> _Records:
        records = self.bank.records.items()
        return {seed: deepcopy(record) for seed, record in records if SeedState(record.state) in IN_PROGRESS}

    def _restore(self, snapshot: FitSnapshot, moment: Moment) -> None:
        memory = snapshot.restore()
        self.controller.recall(memory["controller"])
        self.controller.calm_until = moment.step + steps_of(self.config.conservative, self.controller.total_steps)
        self.stepper.restart(memory["steps"])
        # Lightning goes on counting, and so must what is compared with its step.
        self.tally.load_state_dict(memory["tally"] | {"loss": [*memory["tally"]["loss"][:2], moment.step]})
        for trigger, state in zip(self.triggers, memory["triggers"], strict=True):
            trigger.load_state_dict(state)

    def _end(self, guilty: SeedId | None, known: _Records, under_way: _Records, moment: Moment) -> None:
        """Lock the guilty seed, end its trial, and close the lives that the snapshot does not know of."""
        ended, ending = self._ended(), known | under_way
        closed = {group for _, group, _ in ended} | ({ending[guilty].group} if guilty is not None else set())
        commands = []
        for seed, record in ending.items():
            verbs = (_C.ROLL_BACK,) if seed == guilty else _way_out(SeedState(record.state))
            stays = seed != guilty and seed in known and not (record.group and record.group in closed)
            if stays or self.bank.state(seed) is _S.ROLLED_BACK:
                continue
            if _named(record) in ended:
                record.state, verbs = _S.CULLED.value, ()
            self.bank.impose(record)
            commands += [gate.command_for(str(seed), verb, Reason.EMERGENCY) for verb in verbs]
        self.controller.writer.apply(commands, moment)


def triggers_of(config: RollbackConfig) -> list[Trigger]:
    """Return the triggers that look at the training loss."""
    spike = LossSpike(
        threshold=config.spike if config.spike is not None else 0.0,
        patience=config.spike_patience,
        window=config.spike_window,
        minimum=min(config.spike_minimum, config.spike_window),
    )
    return [NonFiniteLoss(), *([spike] if config.spike is not None else [])]


def _guilty(under_way: _Records, failed: set[SeedId]) -> SeedId | None:
    """Return the seed to lock: one whose child has failed, else the one born last; None if none can be locked."""
    suspects = {seed: record for seed, record in under_way.items() if SeedState(record.state) in _LOCKABLE}
    return max(suspects, key=lambda seed: (seed in failed, suspects[seed].birth, seed), default=None)


def _named(record: SeedRecord) -> tuple[str, str, str]:
    return record.seed_id, record.group, record.blueprint


def _has_failed(graft: Any) -> bool:
    return graft is not None and graft.fault is not None


def _way_out(state: SeedState) -> tuple[SeedCommand, ...]:
    """Return the commands that end an adaptation; the table lets STABILIZATION out through EVALUATING only."""
    ways = {_S.GERMINATED: (_C.CANCEL,), _S.STABILIZATION: (_C.EVALUATE, _C.CULL)}
    return ways.get(state, (_C.CULL,))


def _nothing_left(trigger: RollbackTrigger, detail: str, window: int) -> Exception:
    if trigger is RollbackTrigger.STATE_CORRUPTION:
        return StateCorruption(f"{detail}, and no good snapshot is left; resume from a checkpoint.")
    if not window:
        return RollbackError(f"{detail}: rollback is off; set `rollback.window` above 0, or resume from a checkpoint.")
    return RollbackError(
        f"{detail}, and no good snapshot is left to go back to ({trigger}); the fault is in the data or the settings, "
        "such as a learning rate that is too high. Resume from a checkpoint with these mended."
    )
