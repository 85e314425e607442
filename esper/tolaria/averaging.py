"""Averaged weights (EMA, SWA) that follow growth.

Lightning's callbacks copy the whole module when a fit begins, and from then on pair weights of copy and module by their
place alone. So children join and leave the copy at the boundary at which they join and leave the module; a child joins
with the weights that it has then.
"""

from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from esper.kasmina.bank import SeedBank
from esper.kasmina.graft import Graft
from esper.kasmina.layer import KasminaLayer
from esper.leyline.errors import ConfigError
from esper.tolaria.rollback import averaged


def require_averages(trainer: Trainer, module: LightningModule) -> None:
    """Check that every average of the weights can follow growth.

    Raises:
        ConfigError: one is kept inside the module, was copied before the seeds were attached, or fixes the number of
            parameter groups.
    """
    for path, part in module.named_modules():
        if isinstance(part, AveragedModel):
            raise ConfigError(
                f"the module keeps averaged weights of its own in {path!r}, which children would never join; leave "
                "them out and add Lightning's EMAWeightAveraging or WeightAveraging to the trainer's callbacks."
            )
    for callback in getattr(trainer, "callbacks", []):
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module) and _bank_in(average) is None:
            raise ConfigError(
                f"{type(callback).__name__} stands before Tamiyo and copied the model without its seeds; put Tamiyo "
                "first in Trainer(callbacks=[...])."
            )
        if isinstance(callback, StochasticWeightAveraging) and not callback._initialized:
            _require_one_rate(callback._swa_lrs)


def _require_one_rate(rates: Any) -> None:
    if isinstance(rates, list):
        raise ConfigError(
            f"StochasticWeightAveraging(swa_lrs={rates}) fixes the number of parameter groups, and each child brings "
            f"one; give one number, such as swa_lrs={rates[0]}."
        )


def follow_averages(trainer: Trainer, bank: SeedBank) -> None:
    """Make the averaged copies of the model hold the same children, in the same order, as the model."""
    for model in averaged(trainer):
        twin = _bank_in(model)
        assert twin is not None, "refused when the fit began"
        _imitate(twin, bank)


def _bank_in(model: nn.Module) -> SeedBank | None:
    return next((part for part in model.modules() if isinstance(part, SeedBank)), None)


def _imitate(twin: SeedBank, bank: SeedBank) -> None:
    stays = {str(s) for s, r in twin.records.items() if s in bank.records and bank.records[s].birth == r.birth}
    for layer in bank.all_layers():
        _imitate_layer(twin.layer(layer.path), layer, {s.rpartition("#")[2] for s in stays if _on(s, layer)})
    twin.records, twin.births = deepcopy(bank.records), bank.births
    twin.rows, twin.arrays = dict(bank.rows), deepcopy(bank.arrays)


def _on(seed: str, layer: KasminaLayer) -> bool:
    return seed.rpartition("#")[0] == layer.path


def _imitate_layer(twin: KasminaLayer, layer: KasminaLayer, stays: set[str]) -> None:
    twin.facts, device = layer.facts, twin.health.device
    known = {name: graft for name, graft in twin.grafts.items() if _chunk_slot(name) in stays}
    twin.grafts.clear()
    for name, graft in layer.grafts.items():
        assert isinstance(graft, Graft)
        twin.grafts[name] = known[name] if name in known else deepcopy(graft).to(device)
        _imitate_graft(twin.grafts[name], graft, device)
    twin.refresh()


def _chunk_slot(name: str) -> str:
    """Return `0.1` of a graft's name `c0s1`, as it stands in the seed's id."""
    return name[1:].replace("s", ".")


def _imitate_graft(twin: nn.Module, graft: Graft, device: torch.device) -> None:
    """Copy whatever is no weight of the child; alpha is nothing to average, it is what the strategy says."""
    plain = {n: v for n, v in vars(graft).items() if not n.startswith("_") and n not in ("training", "pending")}
    vars(twin).update(plain)
    for name, buffer in graft._buffers.items():
        # On one device it is the same tensor, so that it is right at every step.
        twin._buffers[name] = None if buffer is None else buffer.to(device)
