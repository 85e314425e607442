"""Small real things that several test folders share."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import esper
from esper.data import Digits
from esper.tamiyo.callback import Tamiyo

QUICK = {"stabilization_steps": 10, "ramp_steps": 4}
"""Seeds that walk their life cycle within a few small epochs."""


class Plain(LightningModule):
    """A user's module that knows nothing of Esper."""

    def __init__(self, scheduler: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10))
        self.scheduler = scheduler
        self.train_losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.train_losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        lr = torch.optim.lr_scheduler
        made = {
            "none": lambda: None,
            "cosine": lambda: lr.CosineAnnealingLR(optimizer, 100),
            "onecycle": lambda: lr.OneCycleLR(optimizer, 3e-3, total_steps=400),
            "lambda": lambda: lr.LambdaLR(optimizer, lambda step: 0.99**step),
            "restarts": lambda: lr.CosineAnnealingWarmRestarts(optimizer, 10),
            "sequential": lambda: lr.SequentialLR(
                optimizer, [lr.LinearLR(optimizer, 0.1, total_iters=20), lr.CosineAnnealingLR(optimizer, 100)], [20]
            ),
        }[self.scheduler]()
        if made is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}


def planting(at: int = 10, blueprint: str = "BP-MLP-GELU", site: str = "net.2", params: int = 600) -> dict[str, Any]:
    """Settings of a schedule with one planting that the gate always passes."""
    entry = {"at": at, "blueprint": blueprint, "site": site, "params": params}
    return {"schedule": (entry,), "budget": 5000, "price_per_kparam": 0.0, "decision_samples": 64}


def digits(**given: Any) -> Digits:
    """The digits data with small, quick epochs of 10 batches."""
    return Digits(**({"batch_size": 64, "train": 640} | given))


def trainer(tmp_path: Any, callback: Tamiyo | None, *, epochs: int = 8, **given: Any) -> Trainer:
    """A quiet CPU trainer that keeps every epoch's checkpoint."""
    keep = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_top_k=-1, filename="{epoch}")
    settings: dict[str, Any] = {
        "max_epochs": epochs,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
        "callbacks": [callback, keep] if callback is not None else [keep],
    }
    return Trainer(**(settings | given))


def grow(tmp_path: Any, **settings: Any) -> tuple[Plain, Tamiyo]:
    """Train the plain module on the digits with one scheduled planting."""
    callback = Tamiyo("schedule", kasmina=QUICK, settings=planting(**settings), targets=["net.*"])
    module = Plain()
    trainer(tmp_path, callback).fit(module, datamodule=digits())
    return module, callback


def states(callback: Tamiyo) -> list[str]:
    """The states of all seeds that are not dormant."""
    return [view.state.value for view in callback.morphable.seeds if view.state.value != "DORMANT"]


__all__ = ["QUICK", "Plain", "DataLoader", "digits", "esper", "grow", "planting", "states", "trainer"]
