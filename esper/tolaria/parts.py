"""What a run's data and outputs are used for: which batches may decide, what its loss and metrics are."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor


def decision_batches(trainer: Trainer, module: LightningModule) -> Iterator[Any]:
    """Yield the batches that may decide: all of validation, or the even ones where there is no test loader."""
    loaders = trainer.val_dataloaders
    several: list[Any] = list(loaders) if isinstance(loaders, list | tuple) else [loaders]
    batches = chain.from_iterable(several)
    if has_report_part(trainer, module):
        yield from batches
        return
    rank_zero_warn("Esper: no test loader; even validation batches decide, odd ones report.")
    yield from (batch for index, batch in enumerate(batches) if index % 2 == 0)


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
