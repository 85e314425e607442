"""Goes on from a checkpoint exactly where its run stood, whatever hook it was written in."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.loop import _Loop

from esper.leyline.errors import CheckpointError
from esper.tolaria.foreign import warn_of_foreign_loaders
from esper.tolaria.logged import NOTHING_LOGGED, logged_state, restore_logged
from esper.tolaria.pause import TORN, Pause, epoch_was_full, owes_epoch_end, settle
from esper.tolaria.random_state import restore_random_state


def loop_state(trainer: Trainer, module: LightningModule, pause: Pause) -> dict[str, Any]:
    """Return what a checkpoint must hold beside Lightning's own entries for a run to go on from here."""
    logged = logged_state(trainer, module)
    state: dict[str, Any] = {"pause": pause.value, "logged": logged, "validating": bool(trainer.validating)}
    in_epoch = pause in (Pause.STEP, Pause.BOUNDARY, Pause.ITERATION)
    if in_epoch and trainer.fit_loop._should_accumulate():
        named = module.named_parameters()
        state["gradients"] = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
    return state


class Continuation:
    """Brings one resumed fit to the place where its checkpoint was written.

    Args:
        checkpoint: what Lightning read; its loop counters are put in order.
        state: what `loop_state` returned when it was written.

    Raises:
        CheckpointError: the checkpoint was written in the middle of a step.
    """

    def __init__(self, checkpoint: dict[str, Any], state: Mapping[str, Any]) -> None:
        """Read the place, and settle Lightning's counters there."""
        loops = checkpoint["loops"]["fit_loop"]
        self.pause = Pause(state["pause"])
        if self.pause is Pause.TORN:
            raise CheckpointError(f"the checkpoint {TORN}")
        self._logged, self._gradients = state.get("logged"), state.get("gradients", {})
        self._validating = bool(state.get("validating"))
        self._owes_epoch_end, self._full = owes_epoch_end(loops), epoch_was_full(loops)
        self.step = int(checkpoint["global_step"])
        settle(loops, self.pause)
        self._epochs = int(loops["epoch_progress"]["current"]["processed"])
        self._random: dict[str, Any] | None = None
        self._limits: tuple[int, int] | None = None

    def lift_limits(self, trainer: Trainer) -> None:
        """Let Lightning enter the loop of a run whose last step is done: it would leave the rest undone."""
        fit = trainer.fit_loop
        if self.pause is Pause.END:
            # Lightning does nothing with it, yet what was measured last is still to be seen.
            restore_logged(trainer, trainer.lightning_module, self._logged or NOTHING_LOGGED)
            return
        self._limits = (fit.epoch_loop.max_steps, int(fit.max_epochs or 0))
        if self.step == fit.epoch_loop.max_steps:
            fit.epoch_loop.max_steps += 1
        if self._epochs == fit.max_epochs:
            fit.max_epochs += 1

    def start(self, trainer: Trainer, module: LightningModule, random: dict[str, Any] | None) -> None:
        """In `on_train_start`: restore what Lightning does not, and prepare what is still owed.

        Args:
            trainer: the trainer.
            module: what it trains.
            random: state of the random generators at the pause.
        """
        self._random = random
        if self._logged is not None:
            restore_logged(trainer, module, self._logged)
        if self.pause in (Pause.EPOCH, Pause.END):
            self._between_epochs(trainer)
        else:
            warn_of_foreign_loaders(trainer)
            _place_loaders(trainer)
            self._restore_gradients(module)
            self._inside_epoch(trainer)
        self._restore_random()

    def _between_epochs(self, trainer: Trainer) -> None:
        """Start the next epoch as an uninterrupted run would; first close the accounts of the last one."""
        fit = trainer.fit_loop
        _Loop.restarting.fset(fit, False)  # type: ignore[attr-defined]
        fit._resuming_from_checkpoint = False
        if self._owes_epoch_end and self.pause is Pause.EPOCH:
            self._restore_random()
            _close_epoch(trainer, full=self._full)
        self._restore_limits(trainer)
        # The iterator of the epoch that is over; Lightning then makes that of the next.
        _place_loaders(trainer)

    def _inside_epoch(self, trainer: Trainer) -> None:
        """Replace the first turn of the loop by what is left to do of the one that the checkpoint interrupted."""
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        connector = trainer._logger_connector
        connector._first_loop_iter = loop.batch_progress.current.ready <= 1

        def advance(data_fetcher: Any) -> None:
            del loop.__dict__["advance"]
            # Lightning would leave the plateau schedulers of this epoch's end alone.
            fit._restarting = False
            loop.restarting = False
            self._restore_limits(trainer)
            self._restore_random()
            if self.pause is Pause.ITERATION:
                if loop._is_training_done:
                    raise StopIteration
                loop.advance(data_fetcher)
                return
            if self.pause is Pause.STEP and not self._validating:
                connector.on_batch_end()
                connector.update_train_step_metrics()
            loop._skip_next_val = self.pause is Pause.BOUNDARY

        loop.__dict__["advance"] = advance

    def _restore_gradients(self, module: LightningModule) -> None:
        """Put back the gradients of an accumulation that was under way."""
        parameters = dict(module.named_parameters())
        for name, gradient in self._gradients.items():
            if name in parameters:
                parameters[name].grad = gradient.to(parameters[name])

    def _restore_limits(self, trainer: Trainer) -> None:
        if self._limits is not None:
            trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = self._limits
            self._limits = None

    def _restore_random(self) -> None:
        if self._random is not None:
            restore_random_state(self._random)


def _place_loaders(trainer: Trainer) -> None:
    """Put the training loaders back to where they were, if Lightning did not.

    It does so only when it first sets the loaders up, which has happened before if anybody asked for the length of the
    run, as most schedules do; and it does not do so at the end of an epoch.
    """
    fit = trainer.fit_loop
    states, fit._combined_loader_states_to_load = fit._combined_loader_states_to_load, []
    if fit._combined_loader is not None and fit._data_fetcher is not None and states:
        fit._combined_loader._load_state_dicts(states)
        iter(fit._data_fetcher)


def _close_epoch(trainer: Trainer, *, full: bool) -> None:
    """Do what Lightning does after the hooks of an epoch's end, among which checkpoints are written."""
    fit, connector = trainer.fit_loop, trainer._logger_connector
    loop, current = fit.epoch_loop, fit.epoch_progress.current
    connector.epoch_end_reached()
    connector.on_epoch_end()
    current.completed -= 1
    try:
        if full:
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        loop._batches_that_stepped -= 1
        connector.update_train_epoch_metrics()
        loop._batches_that_stepped += 1
    finally:
        current.completed += 1
    with torch.no_grad():
        connector.reset_results()
