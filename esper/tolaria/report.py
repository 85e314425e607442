"""The loss on the report part, which nothing that decides has read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from esper.tolaria.evidence import batch_size, losses_of, step_loss
from esper.tolaria.parts import report_batches, validates
from esper.tolaria.snapshot import undisturbed


def report_losses(trainer: Trainer, module: LightningModule) -> list[float]:
    """Return the loss of every sample of the odd validation batches; call it after a fit without a test loader.

    Returns:
        The losses; empty if the run has a test loader, or does not validate.
    """
    if not validates(trainer):
        return []
    module.to(trainer.strategy.root_device)  # A finished fit has left it on the CPU.
    try:
        losses: list[float] = losses_of(trainer, module, report_batches(trainer, module)).tolist()
    finally:
        module.cpu()
    return losses


@contextmanager
def with_test_step(module: LightningModule) -> Iterator[None]:
    """Lend a `test_step` to a module that has none: it logs the loss of the module's other steps as `report_loss`."""
    if is_overridden("test_step", module):
        yield
        return

    def test_step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        with undisturbed(module):
            loss = step_loss(module, batch, dataloader_idx)
        module.log("report_loss", loss, batch_size=batch_size(batch), add_dataloader_idx=False)

    vars(module)["test_step"] = test_step
    try:
        yield
    finally:
        del vars(module)["test_step"]
