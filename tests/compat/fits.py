"""What is asked of every model under the two-line callback: growth in a plain Lightning run, checkpoint, resume."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import esper
from tests.compat.case import Batch, Case, call, fresh
from tests.compat.checks import assert_same

_BATCHES, _EPOCHS, _RESUMED = 3, 4, 1
_SEEDS = {"ramp_steps": 2, "stabilization_steps": 100}


class Task(LightningModule):
    """A user's module that knows nothing of Esper."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.net, self.case, self.train_losses = fresh(case), case, []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.case.loss(call(self.net, batch.inputs), batch)
        self.train_losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.case.loss(call(self.net, batch.inputs), batch), batch_size=1)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.003)

    def train_dataloader(self) -> Any:
        return self._batches(0)

    def val_dataloader(self) -> Any:
        return self._batches(100)

    def test_dataloader(self) -> Any:
        return self._batches(200)

    def _batches(self, start: int) -> Any:
        batches = [self.case.batch(seed) for seed in range(start, start + _BATCHES)]
        return DataLoader(batches, batch_size=None, collate_fn=_itself)


def _itself(batch: Batch) -> Batch:
    return batch


def _fit(case: Case, folder: Path, *callbacks: Callback, epochs: int = _EPOCHS, resume: Path | None = None) -> Task:
    keep = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
    trainer = Trainer(
        max_epochs=epochs, callbacks=[*callbacks, keep], default_root_dir=folder, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    module = Task(case)
    torch.manual_seed(3)
    trainer.fit(module, ckpt_path=resume)
    return module


def _tamiyo(case: Case, folder: Path) -> esper.Tamiyo:
    planting = {"at": 1, "blueprint": case.blueprint, "site": "*", "params": 2000}
    settings = {"schedule": (planting,), "budget": 10_000, "price_per_kparam": 0.0}
    return esper.Tamiyo("schedule", targets=_inside(case), kasmina=_SEEDS, settings=settings, output_dir=str(folder))


def _inside(case: Case) -> Any:
    return None if case.targets is None else tuple(f"net.{target}" for target in case.targets)


def _saved(folder: Path, epoch: int) -> dict[str, Any]:
    return torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True)


def _children(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if ".grafts." in name and ".child." in name}


def grows_and_resumes(case: Case, folder: Path) -> str:
    """Growth by schedule in a plain fit; the run resumed from a grown checkpoint ends bit for bit the same."""
    bare = _fit(case, folder / "bare", epochs=1)
    whole = _fit(case, folder / "whole", _tamiyo(case, folder / "whole"))
    assert whole.train_losses[:_BATCHES] == bare.train_losses, "dormant seeds changed the run"
    middle, last = (_saved(folder / "whole", epoch)["state_dict"] for epoch in (_RESUMED, _EPOCHS - 1))
    young, old = _children(middle), _children(last)
    if not young:
        return "nothing grows"
    assert young.keys() == old.keys()
    assert any(not torch.equal(young[name], old[name]) for name in young), "the child did not train"
    again = _fit(
        case, folder / "again", _tamiyo(case, folder / "again"), resume=folder / "whole" / f"epoch={_RESUMED}.ckpt"
    )
    assert again.train_losses == whole.train_losses[(_RESUMED + 1) * _BATCHES :]
    assert _saved(folder / "again", _EPOCHS - 1)["state_dict"].keys() == last.keys()
    assert_same(_saved(folder / "again", _EPOCHS - 1)["state_dict"], last)
    return "bit-equal"
