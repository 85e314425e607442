"""One small run that germinates, ramps, is judged and ends, and the comparison of everything that it leaves behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

import esper
from esper.kasmina.kernels import KernelStore
from tests.helpers import QUICK, Plain, digits, planting

STRICT = QUICK | {
    "training_objective": "reconstruction",
    "training_steps": 6,
    "freeze_stabilization": True,
    "freeze_fossils": True,
    "fine_tuning_steps": 4,
    "telemetry_every": 3,
}
MEASURED = QUICK | {"telemetry_every": 3}


class Dropping(Plain):
    """A module whose steps draw random numbers and log means over the epoch."""

    def __init__(self, scheduler: str = "none") -> None:
        super().__init__(scheduler)
        self.drop = nn.Dropout(0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(self.drop(x)), y)
        self.log("mean_loss", loss, on_step=True, on_epoch=True)
        self.train_losses.append(float(loss.detach()))
        return loss


class Everywhere(Checkpoint):
    """Keeps a checkpoint of every hook in which one is commonly written, named after the hook and the batches done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, trainer: Trainer, hook: str) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        trainer.save_checkpoint(self.folder / f"{hook}-{done}.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "epoch")

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "end")


class Run:
    """A fit and everything that can be compared of it.

    Args:
        folder: what the run writes.
        kasmina: settings of the seeds.
        scheduler: learning-rate schedule of the module.
        workers: loader processes.
        settings: further settings of the controller.
        module: what is trained.
        data: what it is trained on.
        policy: who decides.
        store: where kernels come from.
        trainer: further arguments of the trainer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kasmina: dict[str, Any] = MEASURED,
        scheduler: str = "none",
        workers: int = 0,
        settings: dict[str, Any] | None = None,
        module: Plain | None = None,
        data: Any = None,
        policy: str = "schedule",
        store: KernelStore | None = None,
        **trainer: Any,
    ) -> None:
        self.folder = folder
        self.module = module if module is not None else Dropping(scheduler)
        self.callback = esper.Tamiyo(
            policy,
            kasmina=kasmina,
            settings=settings or planting(at=7),
            targets=["net.*"],
            output_dir=str(folder),
            store=store,
        )
        self.data = data if data is not None else digits(num_workers=workers)
        given: dict[str, Any] = {
            "max_epochs": 5,
            "val_check_interval": 5,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "default_root_dir": folder,
            "num_sanity_val_steps": 0,
        } | trainer
        callbacks = [self.callback, *given.pop("callbacks", []), Everywhere(folder / "kept")]
        self.trainer = Trainer(callbacks=callbacks, **given)

    def fit(self, checkpoint: Path | None = None, seed: int = 7) -> "Run":
        """Train; what was drawn before from the global generators must not matter to a resumed run."""
        torch.manual_seed(seed)
        given: Any = (
            {"datamodule": self.data}
            if hasattr(self.data, "setup")
            else {"train_dataloaders": self.data[0], "val_dataloaders": self.data[1]}
        )
        self.trainer.fit(self.module, ckpt_path=checkpoint, **given)
        self.random = torch.get_rng_state()
        return self

    def at(self, hook: str, batches: int) -> Path:
        """Return the checkpoint that was written in a hook after so many batches."""
        return self.folder / "kept" / f"{hook}-{batches}.ckpt"


def resumed(whole: Run, checkpoint: Path, folder: Path, **given: Any) -> Run:
    """Return the same run, resumed from a checkpoint in a copy of the folder, other random numbers drawn before."""
    folder.mkdir(parents=True)
    for name in ("events.jsonl", "fieldreports.jsonl"):
        shutil.copy(whole.folder / name, folder / name)
    return Run(folder, **given).fit(checkpoint, seed=99)


def assert_same(whole: Run, part: Run, *, batches: int, ended: bool = False) -> None:
    """Check that a resumed run is the uninterrupted one, bit for bit.

    Args:
        whole: the uninterrupted run.
        part: the resumed one.
        batches: batches trained before the checkpoint.
        ended: whether the run had ended then: nothing is left to do, and nothing to draw random numbers for.
    """
    assert part.module.train_losses == whole.module.train_losses[batches:]
    assert different(whole.module.state_dict(), part.module.state_dict()) == []
    for a, b in zip(whole.trainer.optimizers, part.trainer.optimizers, strict=True):
        assert different(a.state_dict(), b.state_dict()) == []
    for c, d in zip(whole.trainer.lr_scheduler_configs, part.trainer.lr_scheduler_configs, strict=True):
        assert different(c.scheduler.state_dict(), d.scheduler.state_dict()) == []
    assert different(whole.callback.history, part.callback.history) == []
    assert told(whole.folder, "events.jsonl") == told(part.folder, "events.jsonl")
    assert told(whole.folder, "fieldreports.jsonl") == told(part.folder, "fieldreports.jsonl")
    assert reports(whole) == reports(part)
    assert whole.callback.controller is not None and part.callback.controller is not None
    assert whole.callback.controller.explanations == part.callback.controller.explanations
    assert different(whole.trainer.callback_metrics, part.trainer.callback_metrics) == []
    counted = [(run.trainer.global_step, run.trainer.current_epoch) for run in (whole, part)]
    assert counted[0] == counted[1]
    if not ended:
        assert torch.equal(whole.random, part.random)


def told(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines of a journal without the identifiers that every run draws anew."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [_unnamed(line) for line in lines]


def _unnamed(line: dict[str, Any]) -> dict[str, Any]:
    named = {"run_id", "command_id", "id", "created_at", "time"}
    return {k: len(v) if k == "commands" else v for k, v in line.items() if k not in named}


def reports(run: Run) -> list[dict[str, Any]]:
    """Return the field reports that the controller learns from."""
    assert run.callback.controller is not None
    return [_unnamed(report.model_dump()) for report in run.callback.controller.reports]


def different(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the places at which two nested structures differ in a bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and torch.equal(torch.nan_to_num(a.double()), torch.nan_to_num(b.double()))
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in different(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} items"]
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in different(x, y, f"{path}[{i}]")]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a!r} and {b!r}"]
