"""A steady run in which things are broken on purpose, and everything that a rollback must bring back of it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.leyline.base import Message
from esper.leyline.events import RolledBack

Action = Callable[["Script"], None]
STEADY = {"rollback": {"worsening": None, "spike": None}}


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}


class Steady(LightningModule):
    """Every batch is the same; dropout makes each step depend on the random state."""

    def __init__(self, scheduler: str = "lambda") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8), nn.Linear(8, 3))
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.scheduler, self.losses, self.poison = scheduler, [], False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1]) * (math.nan if self.poison else 1.0)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer, lr = torch.optim.AdamW(trained, lr=1e-2), torch.optim.lr_scheduler
        made = {
            "lambda": lambda: lr.LambdaLR(optimizer, lambda step: 0.97**step),
            "cosine": lambda: lr.CosineAnnealingLR(optimizer, 60),
            "onecycle": lambda: lr.OneCycleLR(optimizer, 2e-2, total_steps=200),
            "sequential": lambda: lr.SequentialLR(
                optimizer, [lr.LinearLR(optimizer, 0.1, total_iters=8), lr.CosineAnnealingLR(optimizer, 60)], [8]
            ),
        }[self.scheduler]()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}


class Script(Callback):
    """Does given things before given batches, counted from 0 over the whole run, behind Tamiyo's back."""

    def __init__(self, acts: dict[int, Action]) -> None:
        self.acts, self.batch = acts, -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.trainer, self.module, self.batch = trainer, pl_module, self.batch + 1
        self.tamiyo = next(c for c in trainer.callbacks if isinstance(c, esper.Tamiyo))
        pl_module.poison = False
        if self.batch in self.acts:
            self.acts[self.batch](self)


def ask(script: Script) -> None:
    script.tamiyo.controller.request_rollback("by the test")


def poison(script: Script) -> None:
    script.module.poison = True


def batches(count: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 8, generator=generator), torch.randint(3, (32,), generator=generator)
    # With a generator of its own, a loader's new epoch draws nothing from the global random stream.
    return DataLoader(TensorDataset(x.repeat(count, 1), y.repeat(count)), batch_size=32, generator=generator)


class Run:
    """One fit of the steady module, with a script; four batches between boundaries."""

    def __init__(
        self,
        folder: Path,
        acts: dict[int, Action] | None = None,
        *,
        scheduler: str = "lambda",
        at: int = 8,
        rollback: dict[str, Any] | None = None,
        kasmina: dict[str, Any] | None = None,
        steps: int = 40,
        extra: list[Callback] | None = None,
        ckpt_path: Path | None = None,
        **given: Any,
    ) -> None:
        entry = {"at": at, "blueprint": "BP-MLP-GELU", "site": "net.3", "params": 400}
        settings = {"schedule": (entry,), "budget": 2000, "price_per_kparam": 0.0, "decision_samples": 32}
        settings |= {"rollback": {"worsening": None, "spike": None} | (rollback or {})} | given.pop("settings", {})
        self.events: list[Message] = []
        self.module, self.script = Steady(scheduler), Script(acts or {})
        self.tamiyo = esper.Tamiyo(
            "schedule",
            targets=["net.3"],
            settings=settings,
            kasmina={"ramp_steps": 3, "stabilization_steps": 4} | (kasmina or {}),
            bus=self.events.append,
        )
        self.trainer = Trainer(
            callbacks=[self.tamiyo, self.script, *(extra or [])],
            max_steps=steps,
            max_epochs=-1,
            default_root_dir=folder,
            **(QUIET | given),
        )
        self.trainer.fit(self.module, batches(), batches(1), ckpt_path=ckpt_path)

    @property
    def rollbacks(self) -> list[RolledBack]:
        return [event for event in self.events if isinstance(event, RolledBack)]

    @property
    def states(self) -> list[str]:
        return [view.state.value for view in self.tamiyo.morphable.seeds if view.state.value != "DORMANT"]

    def bank_seeds(self) -> set[str]:
        return {str(seed) for seed in self.tamiyo.bank.grafted()}
