"""The Lightning callback that watches growth and leaves its artifacts in the run's folder."""

import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal, final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from esper.leyline.base import Message
from esper.leyline.errors import ConfigError, DataError
from esper.leyline.events import EpochEvent
from esper.leyline.states import SeedState
from esper.nissa.chronicle import ADDED_PARAMS, Chronicle
from esper.nissa.folder import growth_summary, read_chronicle, require_writable, write_json
from esper.nissa.picture import draw
from esper.nissa.watch.live import Live, Pulse
from esper.tamiyo.callback import Tamiyo
from esper.tamiyo.controller import TamiyoController
from esper.tolaria.evidence import Evidence
from esper.tolaria.saved import lineage, save_model, whole_state

_DETAIL = 200
"""Most characters that are told of an error."""


@final
class GrowthReport(Callback):
    """Watches the `Tamiyo` callback of the same trainer, logs growth, and writes what came of it.

    At the end of the fit the folder holds `growth.png`, `growth.json`, `lineage.json` and the grown model in `model/`.
    During the fit `live.json` tells those who watch where it stands.

    Args:
        output_dir: folder of the artifacts; None takes Tamiyo's, then the trainer's log folder.
        title: name of the run, for the picture and the summary.

    Raises:
        ConfigError: the trainer has no `Tamiyo` callback.
        OutputError: the folder cannot be written; raised before training starts.

    Example:
        >>> import esper, lightning
        >>> trainer = lightning.Trainer(
        ...     callbacks=[esper.Tamiyo(), GrowthReport(output_dir="outputs/run")], logger=False
        ... )
    """

    def __init__(self, *, output_dir: str | None = None, title: str = "") -> None:
        """Hear nothing yet."""
        self.output_dir, self.title = output_dir, title
        self.chronicle = Chronicle()
        self._folder: Path | None = None
        self._trainer: Trainer | None = None
        self._controller: TamiyoController | None = None
        self._pulse: Pulse | None = None

    @property
    def folder(self) -> Path:
        """Folder of the artifacts.

        Raises:
            ConfigError: no fit has started yet.
        """
        if self._folder is None:
            raise ConfigError("GrowthReport has no folder yet; it is chosen when the fit starts.")
        return self._folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run whose report could not be written."""
        tamiyo = _require_tamiyo(trainer)
        chosen = self.output_dir or tamiyo.output_dir or trainer.log_dir or trainer.default_root_dir
        self._folder = require_writable(chosen)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen; by now a resumed run has its id and step back."""
        controller = _require_tamiyo(trainer).controller
        assert controller is not None
        if self.chronicle.run_id != controller.run_id:
            self.chronicle = read_chronicle(self.folder, controller.run_id, until=trainer.global_step)
        self.chronicle.policy, self.chronicle.host_params = controller.config.policy, controller.host_params
        self.chronicle.price_per_kparam = controller.config.price_per_kparam
        self._release()
        self._trainer, self._controller = trainer, controller
        controller.listeners.append(self._hear)
        if trainer.is_global_zero:
            self._pulse = self._begun(trainer)

    def _begun(self, trainer: Trainer) -> Pulse:
        """Say in `live.json` that the run has begun."""
        steps, chronicle = trainer.estimated_stepping_batches, self.chronicle
        live = Live(
            run_id=chronicle.run_id,
            title=self.title,
            policy=chronicle.policy,
            host_params=chronicle.host_params,
            total_steps=int(steps) if 0 < steps < math.inf else None,
            epoch=trainer.current_epoch,
            step=trainer.global_step,
        )
        return Pulse(self.folder, live)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the alphas that the step begins with; they move at its end, before or after our own hook."""
        children = _require_tamiyo(trainer).bank.grafted()
        # A child that failed is bypassed.
        alphas = {str(seed): graft.strength if graft.fault is None else 0.0 for seed, graft in children.items()}
        self.chronicle.ramps.note(trainer.global_step, alphas)
        if self._pulse is not None:
            self._pulse.beat(trainer.global_step, trainer.current_epoch, alphas, self.chronicle.curve)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the training loss."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self.chronicle.curve.add(trainer.global_step, float(loss.detach()))

    def _hear(self, message: Message) -> None:
        if isinstance(message, EpochEvent):
            message = self._measured(message)
            self._log(message)
        self.chronicle.hear(message)

    def _measured(self, event: EpochEvent) -> EpochEvent:
        """Add the loss on the decision part where only the policy `off` left it unmeasured, for comparison."""
        evidence, trainer = self._controller.evidence if self._controller else None, self._trainer
        if event.validation_loss is not None or not isinstance(evidence, Evidence) or trainer is None:
            return event
        validates = trainer.enable_validation and trainer.limit_val_batches != 0
        if not validates and _require_tamiyo(trainer).decision_loader is None:
            return event
        try:
            loss = evidence.loss()
        except DataError:  # Without a decision part there is nothing to compare.
            return event
        return event.model_copy(update={"validation_loss": loss}) if math.isfinite(loss) else event

    def _log(self, event: EpochEvent) -> None:
        if self._trainer is None or self._controller is None:
            return
        metrics = {f"esper/{ADDED_PARAMS}": event.metrics.get(ADDED_PARAMS, 0.0)} | seed_counts(self._controller)
        if event.validation_loss is not None:
            metrics["esper/decision_loss"] = event.validation_loss
        for logger in self._trainer.loggers:
            logger.log_metrics(metrics, step=event.step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything; Tamiyo's last boundary is behind us whatever the order of the callbacks."""
        morphable = _require_tamiyo(trainer).morphable
        state = whole_state(morphable)
        if not trainer.is_global_zero:
            return
        write_json(self.folder / "growth.json", growth_summary(self.chronicle, self.title))
        write_json(self.folder / "lineage.json", lineage(morphable))
        save_model(morphable, self.folder / "model", state=state)
        self.draw()
        self._end("ended")

    def draw(self, twin: Chronicle | None = None) -> Path:
        """Draw `growth.png` again, e.g. with the decision loss of the same run without growth.

        Raises:
            OutputError: the picture cannot be written.
        """
        return draw(self.chronicle, self.folder / "growth.png", twin=twin, title=self.title)

    def state_dict(self) -> dict[str, Any]:
        """Return what was heard as plain data, so that a resumed run tells its whole story."""
        return self.chronicle.to_plain()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.chronicle = Chronicle.from_plain(state_dict)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening on an interrupted run too; the journal keeps what was heard."""
        asked = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        words = "by request" if asked else f"{type(exception).__name__}: {exception}".partition("\n")[0]
        self._end("stopped", words[:_DETAIL])
        self._release()

    def _end(self, state: Literal["ended", "stopped"], detail: str = "") -> None:
        pulse, self._pulse = self._pulse, None
        if pulse is not None and self._trainer is not None:
            pulse.end(state, self._trainer.global_step, self.chronicle.curve, detail)

    def _release(self) -> None:
        if self._controller is not None and self._hear in self._controller.listeners:
            self._controller.listeners.remove(self._hear)
        self._controller = self._trainer = None


def find_tamiyo(trainer: Trainer) -> Tamiyo | None:
    """Return the trainer's `Tamiyo` callback, or None."""
    # Lightning sets this attribute outside its class, where type checkers do not see it.
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    return next((c for c in callbacks if isinstance(c, Tamiyo)), None)


def _require_tamiyo(trainer: Trainer) -> Tamiyo:
    tamiyo = find_tamiyo(trainer)
    if tamiyo is None:
        raise ConfigError("GrowthReport found no Tamiyo among the trainer's callbacks; add esper.Tamiyo().")
    return tamiyo


def seed_counts(controller: TamiyoController) -> dict[str, float]:
    """Return how many seeds are in each state but DORMANT, as metrics for a logger."""
    counts = Counter(controller.bank.state(seed) for seed in controller.bank.records)
    active = (state for state in SeedState if state is not SeedState.DORMANT)
    return {f"esper/seeds_{state.value.lower()}": float(counts[state]) for state in active}
