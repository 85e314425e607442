"""What happens at a boundary of a Lightning fit: measure, decide, apply, and let the optimizer follow."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from esper.kasmina.writer import Moment
from esper.leyline.commands import AdaptationSignal
from esper.leyline.ids import SeedId
from esper.tamiyo.attachment import Attachment
from esper.tamiyo.controller import TamiyoController
from esper.tamiyo.council import Council
from esper.tamiyo.tally import Tally
from esper.tamiyo.work import Work
from esper.tolaria.averaging import follow_averages
from esper.tolaria.evidence import Evidence
from esper.tolaria.optimizers import sync_optimizer
from esper.tolaria.parts import finite_metrics, has_report_part, validates


class Boundary:
    """Carries out the boundaries of one fit.

    Args:
        trainer: the trainer that fits.
        attachment: the seeds and where they hang.
        controller: decides and applies.
        tally: losses and history.
        batches: gives the batches of the decision part.
        council: makes the ranks decide as one.
        child_lr_scale: ratio of a child's learning rate to the host's.
    """

    def __init__(
        self,
        trainer: Trainer,
        attachment: Attachment,
        controller: TamiyoController,
        tally: Tally,
        batches: Callable[[], Iterator[Any]],
        council: Council,
        *,
        child_lr_scale: float,
    ) -> None:
        """Make the evidence of this fit and give it to the controller."""
        self.trainer, self.attachment, self.controller, self.tally = trainer, attachment, controller, tally
        self._batches, self.council, self.child_lr_scale = batches, council, child_lr_scale
        config = controller.config
        self.evidence = self._evidence(config.decision_samples, config.confidence)
        controller.evidence = self.evidence
        self.measured: list[SeedId] = []

    def _evidence(self, samples: int, confidence: float) -> Evidence:
        bank, module = self.attachment.bank, self.attachment.module
        return Evidence(
            self.trainer,
            module,
            bank,
            self._batches,
            samples=samples,
            confidence=confidence,
            shared=self.council.faults,
        )

    def __call__(self, moment: Moment, *, final: bool) -> AdaptationSignal:
        """Observe, decide and apply; `final` judges what can be judged and removes the rest."""
        bank, controller = self.attachment.bank, self.controller
        # Validation runs in inference mode; children made there could never be trained.
        with torch.inference_mode(False), torch.enable_grad():
            self.council.convene(controller, self.tally)
            loss = self._decision_loss()
            self.measured = self.measured if final else list(bank.grafted())
            self._finish_probing(final)
            controller.work = self._work()
            packet = controller.observe(
                moment,
                train_loss=self.tally.train_loss,
                validation_loss=loss,
                # Without a report part of its own, what validation logs also covers the batches that only report.
                metrics=self._metrics() if self._reports() else {},
            )
            signal, _ = controller.step(self.council.packet(packet), final=final)
            self.follow()
            if final and loss is not None and self.measured != list(bank.grafted()):
                loss = self._loss_of_what_stays()
        self.council.compare(self.attachment.module, f"after the boundary at step {moment.step}")
        controller.tell(
            self.tally.record(moment, bank, samples=self.evidence.forward_samples, decision_loss=loss),
        )
        if final:
            share = self._work().overhead
            searched = f" The search took {100 * share:.1f} % of the training's work." if share else ""
            rank_zero_info(f"Esper: {controller.summary()}{searched}")
        return signal

    def follow(self) -> None:
        """Let the optimizer's groups, the schedulers and averaged weights follow the bank's children."""
        trainer = self.trainer
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        sync_optimizer(trainer.optimizers[0], schedulers, self.attachment.bank, lr_scale=self.child_lr_scale)
        self.attachment.follow_in_wrapper(trainer.strategy.model)
        follow_averages(trainer, self.attachment.bank)

    def _metrics(self) -> dict[str, float]:
        return self.council.metrics(finite_metrics(self.trainer))

    def _reports(self) -> bool:
        return has_report_part(self.trainer, self.trainer.lightning_module)

    def _decision_loss(self) -> float | None:
        """Return the loss on the decision part: the validation loop's own where all of validation may decide."""
        logged = self._metrics().get("val_loss")
        if logged is not None and self._reports():
            return logged
        return None if self.controller.config.policy == "off" else self.evidence.loss()

    def _loss_of_what_stays(self) -> float:
        """Measure anew: what was logged is older than the last removals. On the same samples as all losses before."""
        if "val_loss" not in self._metrics() or not self._reports():
            return self.evidence.loss()
        return self._evidence(sys.maxsize, 0.95).loss()

    def _work(self) -> Work:
        """Return what was worked so far; what one sample takes is counted once, by a pass of its own."""
        config, kasmina, tally = self.controller.config, self.attachment.bank.config, self.tally.work
        if not tally.host and (config.policy != "off" or validates(self.trainer)):
            tally.host = self.evidence.macs()
        steps = kasmina.training_steps + kasmina.ramp_steps + kasmina.stabilization_steps
        return tally.work(trial_steps=steps, judged_on=config.decision_samples)

    def _finish_probing(self, final: bool) -> None:
        self.council.probes()
        measured = self.evidence.forward_samples > 0
        fired = any(layer.fired[False] for layer in self.attachment.bank.all_layers())
        if not (fired or measured or (validates(self.trainer) and not final)):
            return  # Nothing has run in evaluation: no site can be refused for not running there.
        for path, reason in self.attachment.finish_probing().items():
            rank_zero_info(f"Esper: {path!r} carries no seeds: {reason}.")
