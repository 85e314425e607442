"""The Lightning callback: makes any LightningModule grow, checkpoint and resume.

Each hook is thin: it observes, lets the controller decide, and lets the one writer apply.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, final

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
from esper.leyline.errors import ConfigError
from esper.leyline.events import SeedTransitioned
from esper.leyline.ids import SeedId
from esper.leyline.states import WITH_CHILD
from esper.tamiyo.attachment import Attachment
from esper.tamiyo.boundary import Boundary
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.controller import TamiyoController
from esper.tamiyo.council import Council, unwrapped
from esper.tamiyo.emergency import Emergency
from esper.tamiyo.journal import Journal
from esper.tamiyo.resumption import Resumption
from esper.tamiyo.support import require_supported
from esper.tamiyo.tally import Tally
from esper.tolaria.atomic import use_atomic_files
from esper.tolaria.checkpoint import describe, migrate, random_state, verify
from esper.tolaria.clipping import SeparateClipping
from esper.tolaria.evidence import batch_size
from esper.tolaria.optimizers import BirthWarmUp, take_children_out, verify_groups
from esper.tolaria.parts import decision_batches, loss_of, validates
from esper.tolaria.rank_state import KEY, gather_states, own_state, reshare
from esper.tolaria.sharded import CHILDREN, ShardedFiles, children_state, is_sharded, whole_tensors

_FALLBACK_STEPS = 1000


@final
class Tamiyo(Callback):
    """Grows the model that a Trainer trains. Works on any LightningModule with automatic optimization.

    The validation loader is the decision part and the test loader the report part. Without a test loader, even
    validation batches decide and odd ones report.

    Args:
        policy: `off`, `random`, `schedule`, `heuristic` or `gradmax`.
        targets: where seeds sit: module types, globs over module paths, or a predicate.
        store: where kernels come from; None builds them on a background thread.
        bus: called with every event, on rank 0.
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
        self.tally = Tally()
        self._given_controller = controller is not None
        self._attachment: Attachment | None = None
        self._stepper: SeedStepper | None = None
        self._boundary: Boundary | None = None
        self._emergency: Emergency | None = None
        self._council: Council | None = None
        self._files: ShardedFiles | None = None
        self._journal: Journal | None = None
        self._saved: dict[str, Any] = {}
        self._saved_here: dict[str, Any] = {}
        self._saved_groups: list[dict[str, Any]] | None = None
        self._probed = False
        self._resumption = Resumption()

    @property
    def history(self) -> list[dict[str, float]]:
        """One record per boundary."""
        return self.tally.history

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
        use_atomic_files(trainer)
        if stage == "fit":
            self._resumption.interruption.prepare(trainer)
        if self._attachment is None or self._attachment.module is not pl_module:
            self._attachment = Attachment.find_or_make(pl_module, self.kasmina, self.targets)
            self._make_controller(trainer.is_global_zero)
        if trainer.world_size > 1:
            self._attachment.keep_from_wrapper()
        self._files = ShardedFiles(trainer, self.bank, self._follow)

    def _make_controller(self, first_rank: bool) -> None:
        if self.controller is None or not self._given_controller:
            self.controller = TamiyoController(self.morphable, self.config, store=self.store)
        if self._saved:
            self._restore(self._saved)
        self._stepper = SeedStepper(self.bank)
        listeners = (self.bus if first_rank else None, self._write)
        self.controller.listeners += [listener for listener in listeners if listener is not None]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Verify what was read."""
        resuming = trainer.state.fn is TrainerFn.FITTING
        sharded = is_sharded(trainer.strategy)
        if not sharded:
            verify(checkpoint, resuming=resuming)
        self._saved_here = own_state(checkpoint, trainer.global_rank, trainer.world_size) if resuming else {}
        if resuming and self._attachment is not None:
            migrate(checkpoint)
            reshare(checkpoint, trainer.world_size)
            self._resumption.load(checkpoint, self._saved_here)
            if sharded:
                self._resume_late(trainer)
            else:
                self._saved_groups = checkpoint["optimizer_states"][0]["param_groups"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the children to the optimizer that `configure_optimizers` made for the host."""
        attachment, controller = self._ready()
        require_supported(trainer, pl_module, judges=self.config.policy != "off" and self.decision_loader is None)
        attachment.show()
        attachment.refuse_replaced()
        attachment.bank.to(pl_module.device)
        folder = self.output_dir or trainer.log_dir or trainer.default_root_dir
        assert self._stepper is not None
        self._council = council = Council.of(trainer, controller, self._stepper)
        self._journal = council.ranks.on_zero(lambda: Journal(folder, self._resumption.cursor))
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total):
            rank_zero_info(f"Esper: the run has no set length; fractions of it are taken of {_FALLBACK_STEPS} steps.")
        controller.total_steps = int(total) if math.isfinite(total) else _FALLBACK_STEPS
        self._probed = self._resumption.has_stepped
        batches = lambda: iter(self.decision_loader or decision_batches(trainer, pl_module))  # noqa: E731
        scale = self.child_lr_scale
        self._boundary = Boundary(trainer, attachment, controller, self.tally, batches, council, child_lr_scale=scale)
        if not is_overridden("configure_gradient_clipping", pl_module):
            attachment.replace_clipping(SeparateClipping())
        take_children_out(trainer.optimizers[0], attachment.bank)
        self._boundary.follow()
        if self._saved_groups is not None:
            verify_groups(self._saved_groups, trainer.optimizers[0])
            self._saved_groups = None
        self.warm_up.attach(trainer.optimizers[0])
        controller.refetch()
        self._resumption.fit_start(trainer, attachment.bank, self._boundary)
        self._emergency = Emergency(
            self._boundary, self._stepper, controller.config.rollback, self._resumption.interruption
        )

    def _follow(self) -> None:
        if self._boundary is not None:
            self._boundary.follow()

    def _resume_late(self, trainer: Trainer) -> None:
        """Do what `on_fit_start` does in a resumed run: a sharded host reads its checkpoint after that hook."""
        attachment, controller = self._ready()
        assert self._boundary is not None
        if self._journal is not None:
            self._journal.close()
            self._journal = Journal(self._journal.folder, self._resumption.cursor)
        self._probed = self._resumption.has_stepped
        controller.refetch()
        self._resumption.fit_start(trainer, attachment.bank, self._boundary)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a resume, go to the very place where the checkpoint was written."""
        random = (self._saved | self._saved_here).get("random")
        if "decision_samples" in self._saved and self._boundary is not None:
            self._boundary.evidence.forward_samples = self._saved["decision_samples"]
        self._saved, self._saved_here = {}, {}
        self._resumption.train_start(trainer, pl_module, random)
        assert self._council is not None
        self._council.compare(pl_module, "at the start of training")

    # --- step ---------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the snapshot that is due; open or close the sampling of health."""
        assert self._stepper is not None and self._emergency is not None
        self._resumption.whereabouts.step_begun()
        self._emergency.before_batch(self._moment(trainer), batch_idx)
        self._stepper.begin(trainer.global_step)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the children's gradients over the ranks, before anything unscales or clips them."""
        assert self._council is not None
        if not trainer.fit_loop._should_accumulate():
            self._council.gradients()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Sample gradients before they are clipped."""
        assert self._stepper is not None
        self._stepper.observe_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go back if something went wrong; move alphas and clocks once per optimizer step."""
        assert self._emergency is not None
        if not self._emergency.after_batch(outputs, self._moment(trainer)):
            self._count(trainer, loss_of(outputs), batch_size(batch))
        self._resumption.whereabouts.step_counted(trainer)

    def _count(self, trainer: Trainer, loss: float, samples: int) -> None:
        if not self.tally.add(loss, step=trainer.global_step, samples=samples * trainer.world_size):
            return
        assert self._stepper is not None and self._council is not None
        self._stepper.end(self._council.loss(loss))
        if not self._probed:
            self._probed = True
            _, controller = self._ready()
            self._council.probes()
            controller.prepare(self._moment(trainer))

    # --- boundary -----------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A boundary: observe, decide, apply."""
        if trainer.state.fn is TrainerFn.FITTING and not trainer.sanity_checking:
            self._at_boundary(trainer, final=False)
            self._resumption.whereabouts.boundary_done(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A boundary, for a run that does not validate but was given a decision loader."""
        if self.decision_loader is not None and not validates(trainer):
            self._at_boundary(trainer, final=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last boundary: judge what can be judged, remove the rest."""
        self._at_boundary(trainer, final=True)
        self._resumption.whereabouts.ended = True

    def _at_boundary(self, trainer: Trainer, *, final: bool) -> None:
        assert self._boundary is not None and self._emergency is not None
        moment = self._moment(trainer)
        if self._emergency.before_boundary(moment) and not final:
            return
        self._emergency.after_boundary(self._boundary(moment, final=final), moment)

    def _write(self, message: Message) -> None:
        if isinstance(message, SeedTransitioned) and message.target not in WITH_CHILD and self._stepper is not None:
            self._stepper.forget(SeedId.parse(message.seed_id))
        if self._journal is not None:
            self._journal.write(message)

    # --- checkpoint ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add digests and the readable topology; the weights' own copy of it travels in the state dict."""
        if self._attachment is None:
            return  # The run failed before it began, and another callback saves that.
        state = whole_tensors(checkpoint["state_dict"]) if trainer.is_global_zero else {}
        checkpoint["esper"] = describe(self.bank, state)
        run = self._resumption.save(trainer, pl_module, self.bank, self._boundary)
        if self._council is not None:
            own = {"random": random_state(), "loss": self.tally.state_dict()["loss"], "run": run}
            checkpoint["esper"][KEY] = gather_states(self._council.ranks, own)
        if is_sharded(trainer.strategy):
            checkpoint["esper"][CHILDREN] = children_state(trainer.optimizers[0])
        assert self.controller is not None
        checkpoint["esper"]["run"] = run | self._resumption.journal(self._journal, self.controller.run_id)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: the controller, the random state, the history."""
        if self.controller is None:
            return {}
        return {
            "controller": self.controller.state_dict(),
            "random": random_state(),
            "decision_samples": self._boundary.evidence.forward_samples if self._boundary is not None else 0,
            "steps": self._stepper.state_dict() if self._stepper is not None else {},
            **self.tally.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        From here on the children are hidden: `configure_optimizers` comes next, and their groups are added after it, in
        order.
        """
        self._saved = dict(state_dict)
        if self._saved_groups is not None and self._attachment is not None:
            self._attachment.hide()
        if self.controller is not None and state_dict:
            self._restore(state_dict)

    def _restore(self, state: dict[str, Any]) -> None:
        assert self.controller is not None
        self.controller.load_state_dict(state["controller"])
        if self._stepper is not None:
            self._stepper.load_state_dict(state["steps"])
        self.tally.load_state_dict(state | {k: v for k, v in self._saved_here.items() if k == "loss"})

    # --- end ----------------------------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of what the fit needed; the grown model stays as it is."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save and let go on an interrupted run too: Lightning does not call `teardown` then."""
        self._resumption.failed(trainer, exception)
        self._release()

    def _release(self) -> None:
        self._resumption.release()
        if self._files is not None:
            self._files.release()
        self.warm_up.detach()
        if self._attachment is not None:
            self._attachment.show()
            self._attachment.restore_clipping()
        if self.controller is not None:
            self.controller.use_store(unwrapped(self.controller.store))
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
