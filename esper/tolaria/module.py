"""The LightningModule that trains a network on a task."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from esper.tolaria.schedules import WarmupDecay
from esper.tolaria.tasks import Task


class TolariaModule(LightningModule):
    """Trains a network; growth comes from the `Tamiyo` callback, this module knows nothing of it.

    Args:
        network: the host, wrapped or not.
        task: what it is trained for.
        optimizer: makes the optimizer from the host's parameters.
        warmup_steps: linear warm-up of the learning rate, in optimizer steps.
        decay: fraction of the run over which the rate decays linearly at the end.
        floor: final rate as a fraction of the peak.
        total_steps: length of the schedule; None takes the trainer's.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        task: Task,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
        decay: float = 0.3,
        floor: float = 0.05,
        total_steps: int | None = None,
    ) -> None:
        """Remember the parts."""
        super().__init__()
        self.network, self.task, self.make_optimizer = network, task, optimizer
        self.warmup_steps, self.decay, self.floor, self.total_steps = warmup_steps, decay, floor, total_steps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        return self.network(*args, **kwargs)

    def setup(self, stage: str) -> None:
        """Get the task ready for training."""
        if stage == "fit":
            self.task.prepare(getattr(self.trainer, "datamodule", None))

    def teardown(self, stage: str) -> None:
        """Let the task go of what only training needs."""
        if stage == "fit":
            self.task.release()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the objective of a batch."""
        step = self.task.losses(self.network, batch)
        self.log("train_loss", step.objective.detach(), prog_bar=True, batch_size=len(step.samples_B))
        return step.objective

    def decision_losses(self, batch: Any) -> Tensor:
        """Return the task loss of each sample, [B]."""
        return self.task.losses(self.network, batch).samples_B

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss on the decision part."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss on the report part."""
        self._evaluate(batch, "report")

    def _evaluate(self, batch: Any, part: str) -> None:
        step = self.task.losses(self.network, batch)
        size = len(step.samples_B)
        for name, value in {"loss": step.samples_B.mean(), **step.metrics}.items():
            self.log(f"{part}_{name}", value, prog_bar=part == "val", batch_size=size, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make the optimizer and its schedule, stepped every training step."""
        optimizer = self.make_optimizer(self.parameters())
        total = self.total_steps or int(min(self.trainer.estimated_stepping_batches, 10**9))
        shape = WarmupDecay(total, self.warmup_steps, self.decay, self.floor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": shape.scheduler(optimizer), "interval": "step"}}
