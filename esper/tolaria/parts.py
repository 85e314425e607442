"""What a run's data and outputs are used for: which batches may decide or report, what its loss and metrics are."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils._pytree import tree_flatten

from esper.tolaria.shards import unpadded


class FromLoader(NamedTuple):
    """A batch of one of several loaders.

    Args:
        batch: the batch.
        dataloader_idx: index of its loader, as a `validation_step` is told.
    """

    batch: Any
    dataloader_idx: int


def decision_batches(trainer: Trainer, module: LightningModule) -> Iterator[FromLoader]:
    """Yield the batches that may decide: all of validation, or the even ones where there is no test loader."""
    if has_report_part(trainer, module):
        return _validation_batches(trainer)
    rank_zero_warn("Esper: no test loader; even validation batches decide, odd ones report.")
    return islice(_validation_batches(trainer), 0, None, 2)


def report_batches(trainer: Trainer, module: LightningModule) -> Iterator[FromLoader]:
    """Yield the validation batches that report, and never decide: the odd ones where there is no test loader."""
    if has_report_part(trainer, module):
        return iter(())
    return islice(_validation_batches(trainer), 1, None, 2)


def _validation_batches(trainer: Trainer) -> Iterator[FromLoader]:
    """Yield what the validation loop reads, one loader after the other."""
    loaders, _ = tree_flatten(trainer.val_dataloaders)
    for index, (loader, limit) in enumerate(zip(loaders, trainer.num_val_batches, strict=False)):
        most = None if math.isinf(limit) else int(limit)
        yield from (FromLoader(batch, index) for batch in islice(unpadded(loader), most))


def has_report_part(trainer: Trainer, module: LightningModule) -> bool:
    """Return whether a test loader exists, which nothing that decides may read."""
    source = getattr(trainer, "datamodule", None)
    return is_overridden("test_dataloader", module) or (source is not None and is_overridden("test_dataloader", source))


def validates(trainer: Trainer) -> bool:
    """Return whether the run has a validation loop."""
    return bool(trainer.enable_validation) and trainer.limit_val_batches != 0


def loss_of(outputs: Any) -> float:
    """Return the loss of a training step's outputs; NaN when there is none."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return float(loss.detach()) if isinstance(loss, Tensor) else math.nan


def finite_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the logged scalars that are finite."""
    values = {k: float(v) for k, v in trainer.callback_metrics.items() if isinstance(v, Tensor) and v.numel() == 1}
    return {name: value for name, value in values.items() if math.isfinite(value)}
