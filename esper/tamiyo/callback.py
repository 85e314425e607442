"""The Lightning callback: makes any LightningModule grow, checkpoint and resume.

Each hook is thin: it observes, lets the controller decide, and lets the one writer apply.
"""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from esper.kasmina.bank import SeedBank
from esper.kasmina.config import KasminaConfig
from esper.kasmina.kernels import KernelStore
from esper.kasmina.sites import Targets
from esper.kasmina.steps import SeedStepper
from esper.kasmina.wrapper import MorphableModel
from esper.kasmina.writer import Moment
from esper.leyline.base import Message
from esper.leyline.errors import ConfigError, DataError
from esper.leyline.events import EpochEvent, SeedTransitioned
from esper.leyline.ids import SeedId
from esper.leyline.states import WITH_CHILD
from esper.tamiyo.attachment import Attachment
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.controller import TamiyoController
from esper.tamiyo.journal import Journal
from esper.tolaria.checkpoint import describe, random_state, restore_random_state, verify
from esper.tolaria.clipping import SeparateClipping
from esper.tolaria.evidence import Evidence
from esper.tolaria.optimizers import BirthWarmUp, sync_optimizer, take_children_out, verify_groups
from esper.tolaria.parts import decision_batches, finite_metrics, has_report_part, loss_of, validates

_FALLBACK_STEPS = 1000


@final
class Tamiyo(Callback):
    """Grows the model that a Trainer trains. Works on any LightningModule with automatic optimization.

    The validation loader is the decision part and the test loader the report part. Without a test loader, even
    validation batches decide and odd ones report.

    Args:
        policy: `off`, `random`, `schedule` or `heuristic`.
        targets: where seeds sit: module types, globs over module paths, or a predicate.
        store: where kernels come from; None builds them on a background thread.
        bus: called with every event.
        seeds_per_layer: chunks of each layer's features.
        kasmina: settings of the seeds, `KasminaConfig` or a dict of its keys.
        settings: further settings of the controller, `TamiyoConfig` or a dict of its keys.
        child_lr_scale: ratio of a child's learning rate to the host's.
        child_warmup_steps: optimizer steps from birth to a child's full learning rate.
        output_dir: folder of `events.jsonl` and `fieldreports.jsonl`; None takes the trainer's log folder.
        controller: a ready controller, for a model wrapped by hand.
        decision_loader: batches of the decision part, for a module without validation; its boundaries are the ends of
            training epochs.

    Example:
        >>> import lightning, esper
        >>> trainer = lightning.Trainer(
        ...     callbacks=[esper.Tamiyo(policy="off")], max_epochs=1, logger=False, enable_checkpointing=False
        ... )
    """

    def __init__(
        self,
        policy: str = "heuristic",
        targets: Targets = None,
        store: KernelStore | None = None,
        bus: Callable[[Message], None] | None = None,
        *,
        seeds_per_layer: int = 1,
        kasmina: dict[str, Any] | KasminaConfig | None = None,
        settings: dict[str, Any] | TamiyoConfig | None = None,
        child_lr_scale: float = 1.0,
        child_warmup_steps: int = 0,
        output_dir: str | None = None,
        controller: TamiyoController | None = None,
        decision_loader: Iterable[Any] | None = None,
    ) -> None:
        """Check the settings; nothing is attached before the trainer starts."""
        if isinstance(settings, dict) and "policy" in settings:
            raise ConfigError("give the policy as Tamiyo(policy=...), not inside `settings`.")
        self.config = TamiyoConfig.of(TamiyoConfig.of(settings).model_dump() | {"policy": policy})
        seeds = KasminaConfig.of(kasmina)
        if seeds_per_layer != 1:
            seeds = KasminaConfig.of(seeds.model_dump() | {"seeds_per_layer": seeds_per_layer})
        self.kasmina, self.targets, self.store, self.bus = seeds, targets, store, bus
        self.child_lr_scale, self.warm_up = child_lr_scale, BirthWarmUp(child_warmup_steps)
        self.output_dir, self.decision_loader = output_dir, decision_loader
        self.controller = controller
        self.history: list[dict[str, float]] = []
        self._given_controller = controller is not None
        self._attachment: Attachment | None = None
        self._stepper: SeedStepper | None = None
        self._evidence: Evidence | None = None
        self._journal: Journal | None = None
        self._saved: dict[str, Any] = {}
        self._saved_groups: list[dict[str, Any]] | None = None
        self._loss_sum, self._loss_count, self._last_step = 0.0, 0, -1
        self._probed = False
        self._measured: list[SeedId] = []

    @property
    def morphable(self) -> MorphableModel:
        """The model with its seeds.

        Raises:
            ConfigError: the trainer has not started.
        """
        if self._attachment is None:
            raise ConfigError("Tamiyo has no model yet; it is attached when the trainer starts.")
        return self._attachment.morphable

    @property
    def bank(self) -> SeedBank:
        """The seeds, also while they are hidden from the module tree."""
        self.morphable  # noqa: B018 - raises the clear error
        assert self._attachment is not None
        return self._attachment.bank

    # --- attach -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach seeds, so that a checkpoint's grown weights find their place."""
        if self._attachment is None or self._attachment.module is not pl_module:
            self._attachment = Attachment.find_or_make(pl_module, self.kasmina, self.targets)
            self._make_controller()

    def _make_controller(self) -> None:
        if self.controller is None or not self._given_controller:
            self.controller = TamiyoController(self.morphable, self.config, store=self.store)
        if self._saved:
            self._restore(self._saved)
        self._stepper = SeedStepper(self.bank)
        self.controller.listeners += [listener for listener in (self.bus, self._write) if listener is not None]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Verify; hide the children while `configure_optimizers` runs: their groups are added after it, in order."""
        resuming = trainer.state.fn is TrainerFn.FITTING
        verify(checkpoint, resuming=resuming)
        if resuming and self._attachment is not None:
            self._attachment.hide()
            self._saved_groups = checkpoint["optimizer_states"][0]["param_groups"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the children to the optimizer that `configure_optimizers` made for the host."""
        attachment, controller = self._ready()
        self._refuse(trainer, pl_module)
        attachment.show()
        attachment.bank.to(pl_module.device)
        self._journal = Journal(self.output_dir or trainer.log_dir or trainer.default_root_dir)
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total):
            rank_zero_info(f"Esper: the run has no set length; fractions of it are taken of {_FALLBACK_STEPS} steps.")
        controller.total_steps = int(total) if math.isfinite(total) else _FALLBACK_STEPS
        self._probed = False
        self._evidence = Evidence(
            trainer,
            pl_module,
            attachment.bank,
            lambda: iter(self.decision_loader or decision_batches(trainer, pl_module)),
            samples=controller.config.decision_samples,
            confidence=controller.config.confidence,
        )
        self._evidence.forward_samples = self._saved.get("decision_samples", 0)
        controller.evidence = self._evidence
        if not is_overridden("configure_gradient_clipping", pl_module):
            attachment.replace_clipping(SeparateClipping())
        take_children_out(trainer.optimizers[0], attachment.bank)
        self._sync(trainer)
        if self._saved_groups is not None:
            verify_groups(self._saved_groups, trainer.optimizers[0])
            self._saved_groups = None
        self.warm_up.attach(trainer.optimizers[0])
        controller.refetch()

    def _refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ConfigError("Tamiyo needs automatic optimization; set automatic_optimization=True on the module.")
        if trainer.world_size > 1:
            raise ConfigError(f"growth on {trainer.world_size} processes is not supported yet; use devices=1.")
        if len(trainer.optimizers) != 1:
            raise ConfigError(f"Tamiyo needs one optimizer, the module configures {len(trainer.optimizers)}.")
        if self.config.policy != "off" and self.decision_loader is None and not validates(trainer):
            raise DataError(
                "the decision part is missing: this run does not validate. Give the trainer a validation loader and "
                "the module a validation_step (and leave limit_val_batches above 0), or pass decision_loader= to "
                "Tamiyo, or use policy='off'."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a resume, put the random state back to what it was when the checkpoint was written."""
        if "random" in self._saved:
            restore_random_state(self._saved["random"])
        self._saved = {}

    # --- step ---------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open or close the sampling of health."""
        assert self._stepper is not None
        self._stepper.begin(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Sample gradients before they are clipped."""
        assert self._stepper is not None
        self._stepper.observe_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move alphas and clocks once per optimizer step."""
        loss = loss_of(outputs)
        self._loss_sum, self._loss_count = self._loss_sum + loss, self._loss_count + 1
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        assert self._stepper is not None
        self._stepper.end(loss)
        if not self._probed:
            self._probed = True
            _, controller = self._ready()
            controller.prepare(self._moment(trainer))

    # --- boundary -----------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A boundary: observe, decide, apply."""
        if trainer.state.fn is TrainerFn.FITTING and not trainer.sanity_checking:
            self._boundary(trainer, final=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A boundary, for a run that does not validate but was given a decision loader."""
        if self.decision_loader is not None and not validates(trainer):
            self._boundary(trainer, final=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last boundary: judge what can be judged, remove the rest."""
        self._boundary(trainer, final=True)

    def _boundary(self, trainer: Trainer, *, final: bool) -> None:
        attachment, controller = self._ready()
        assert self._evidence is not None
        # Validation runs in inference mode; children made there could never be trained.
        with torch.inference_mode(False), torch.enable_grad():
            loss = self._decision_loss(trainer)
            self._measured = self._measured if final else list(self.bank.grafted())
            self._finish_probing(trainer, final)
            packet = controller.observe(
                self._moment(trainer),
                train_loss=self._train_loss(),
                validation_loss=loss,
                # Without a report part of its own, what validation logs also covers the batches that only report.
                metrics=finite_metrics(trainer) if has_report_part(trainer, trainer.lightning_module) else {},
            )
            controller.step(packet, final=final)
            self._sync(trainer)
            if final and loss is not None and self._measured != list(self.bank.grafted()):
                loss = self._loss_of_what_stays(trainer)
        self._record(trainer, loss)
        if final:
            rank_zero_info(f"Esper: {controller.summary()}")

    def _decision_loss(self, trainer: Trainer) -> float | None:
        """Return the loss on the decision part: the validation loop's own where all of validation may decide."""
        _, controller = self._ready()
        assert self._evidence is not None
        logged = finite_metrics(trainer).get("val_loss")
        if logged is not None and has_report_part(trainer, trainer.lightning_module):
            return logged
        return None if controller.config.policy == "off" else self._evidence.loss()

    def _loss_of_what_stays(self, trainer: Trainer) -> float:
        """Measure anew: what was logged is older than the last removals. On the same samples as all losses before."""
        assert self._evidence is not None
        module = trainer.lightning_module
        if "val_loss" not in finite_metrics(trainer) or not has_report_part(trainer, module):
            return self._evidence.loss()
        batches = lambda: iter(self.decision_loader or decision_batches(trainer, module))  # noqa: E731
        return Evidence(trainer, module, self.bank, batches, samples=sys.maxsize, confidence=0.95).loss()

    def _finish_probing(self, trainer: Trainer, final: bool) -> None:
        attachment, _ = self._ready()
        measured = self._evidence is not None and self._evidence.forward_samples > 0
        fired = any(layer.fired[False] for layer in attachment.bank.all_layers())
        if not (fired or measured or (validates(trainer) and not final)):
            return  # Nothing has run in evaluation: no site can be refused for not running there.
        for path, reason in attachment.finish_probing().items():
            rank_zero_info(f"Esper: {path!r} carries no seeds: {reason}.")

    def _sync(self, trainer: Trainer) -> None:
        bank = self.bank
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        sync_optimizer(trainer.optimizers[0], schedulers, bank, lr_scale=self.child_lr_scale)

    def _train_loss(self) -> float | None:
        return self._loss_sum / self._loss_count if self._loss_count else None

    def _record(self, trainer: Trainer, decision_loss: float | None) -> None:
        bank = self.bank
        moment, train_loss = self._moment(trainer), self._train_loss()
        entry = {
            "step": float(moment.step),
            "epoch": float(moment.epoch),
            "added_params": float(bank.added_parameters()),
            "added_macs": float(sum(bank.records[seed].macs for seed in bank.grafted())),
            "decision_samples": float(self._evidence.forward_samples) if self._evidence else 0.0,
        }
        entry |= {"train_loss": train_loss} if train_loss is not None else {}
        entry |= {"decision_loss": decision_loss} if decision_loss is not None else {}
        self.history.append(entry)
        self._loss_sum, self._loss_count = 0.0, 0
        event = EpochEvent(
            run_id=moment.run_id,
            epoch=moment.epoch,
            step=moment.step,
            train_loss=train_loss if train_loss is not None and math.isfinite(train_loss) else None,
            validation_loss=decision_loss if decision_loss is not None and math.isfinite(decision_loss) else None,
            metrics={"added_params": float(bank.added_parameters())},
        )
        _, controller = self._ready()
        for listener in controller.listeners:
            listener(event)

    def _write(self, message: Message) -> None:
        if isinstance(message, SeedTransitioned) and message.target not in WITH_CHILD and self._stepper is not None:
            self._stepper.forget(SeedId.parse(message.seed_id))
        if self._journal is not None:
            self._journal.write(message)

    # --- checkpoint ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add digests and the readable topology; the weights' own copy of it travels in the state dict."""
        checkpoint["esper"] = describe(self.bank, checkpoint["state_dict"])

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: the controller, the random state, the history."""
        if self.controller is None:
            return {}
        return {
            "controller": self.controller.state_dict(),
            "random": random_state(),
            "decision_samples": self._evidence.forward_samples if self._evidence is not None else 0,
            "steps": self._stepper.state_dict() if self._stepper is not None else {},
            "history": [dict(entry) for entry in self.history],
            "loss": [self._loss_sum, self._loss_count, self._last_step],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._saved = dict(state_dict)
        if self.controller is not None and state_dict:
            self._restore(state_dict)

    def _restore(self, state: dict[str, Any]) -> None:
        assert self.controller is not None
        self.controller.load_state_dict(state["controller"])
        if self._stepper is not None:
            self._stepper.load_state_dict(state["steps"])
        self.history = [dict(entry) for entry in state["history"]]
        self._loss_sum, self._loss_count, self._last_step = state["loss"]

    # --- end ----------------------------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of what the fit needed; the grown model stays as it is."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go on an interrupted run too: Lightning does not call `teardown` then."""
        self._release()

    def _release(self) -> None:
        self.warm_up.detach()
        if self._attachment is not None:
            self._attachment.show()
            self._attachment.restore_clipping()
        if self.controller is not None and self.store is None and not self._given_controller:
            self.controller.close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _ready(self) -> tuple[Attachment, TamiyoController]:
        assert self._attachment is not None and self.controller is not None
        return self._attachment, self.controller

    def _moment(self, trainer: Trainer) -> Moment:
        _, controller = self._ready()
        return Moment(controller.run_id, trainer.current_epoch, trainer.global_step)
