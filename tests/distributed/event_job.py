"""Culling, going back, signals and replaced layers, on every rank of a DDP job; started by `launch.Job`.

Arguments: the job's folder, the name of the job, and `endless` where it goes on until it is asked to stop.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, nn

import esper
from benchmarks import faults
from esper.data import Digits
from esper.tolaria.exchange import bit_sum
from tests.distributed import ddp_job
from tests.distributed.ddp_job import fit, life, strategy
from tests.helpers import Plain, planting
from tests.tolaria.runs import Dropping

# --- culling -----------------------------------------------------------------------------------------------------


def culled(folder: Path) -> dict[str, Any]:
    """The first planting lowers the loss enough for its gate, the second does not."""
    return {"culled": fit(folder / "culled", settings=life() | {"min_effect": MIN_EFFECT})}


MIN_EFFECT = 0.01


# --- going back --------------------------------------------------------------------------------------------------


class Net(faults.Net):
    """A network whose loss may be far too large for some batches on one rank."""

    spike = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.spike, factor = max(0, self.spike - 1), 1000.0 if self.spike else 1.0
        return loss * factor


class OneRank(faults.Saboteur):
    """Breaks something on some ranks only, and compares on all of them.

    `loss spike` is a run of batches; `asked in validation` waits for the next one.
    """

    def __init__(self, case: faults.Case, tamiyo: esper.Tamiyo, kind: str, ranks: tuple[int, ...]) -> None:
        super().__init__(case, tamiyo)
        self.kind, self.ranks, self.pending = kind, ranks, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # The ranks' random streams differ, so that each has a snapshot of its own.
        torch.manual_seed(ddp_job.RANK)
        self.tamiyo.controller.listeners.append(self.hear)

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.pending:
            self.pending = False
            self.tamiyo.controller.request_rollback(f"asked for in the validation of rank {ddp_job.RANK}")

    def _break(self, module: Any, optimizer: Any) -> None:
        if ddp_job.RANK not in self.ranks:
            return
        if self.kind == "loss spike":
            module.spike = 5
        elif self.kind == "asked in validation":
            self.pending = True
        else:
            super()._break(module, optimizer)


CASES = {
    "NaN": ("loss is NaN", "loss is NaN", "GRAFTING", (1,), 55),
    "spike": ("loss spike", "weights times 1000", "FINE_TUNING", (1,), 85),
    "corruption": ("state arrays overwritten", "state arrays overwritten", "STABILIZATION", (1,), 70),
    "signal": ("Tamiyo's signal", "Tamiyo's signal", "EVALUATING", (0, 1), 80),
    "asked": ("asked for by hand", "asked for by hand", "TRAINING", (1,), 40),
    "asked in validation": ("asked in validation", "asked for by hand", "TRAINING", (1,), 40),
}
"""What is broken, the fault of the campaign whose trigger it pulls, in which stage, on which ranks, and the steps."""


def back(folder: Path) -> dict[str, Any]:
    """Every kind of going back; the fault is on rank 1 only wherever it can be."""
    return {name: one_way_back(folder / name, *given) for name, given in CASES.items()}


def one_way_back(folder: Path, kind: str, fault: str, stage: str, ranks: tuple[int, ...], steps: int) -> dict[str, Any]:
    case = faults.Case(fault, stage, offset=3)
    kasmina = {"training_steps": 12, "ramp_steps": 12, "stabilization_steps": 10, "fine_tuning_steps": 10}
    settings = planting(at=25, site="net.3") | {"decision_samples": 32, "confidence": 0.501}
    settings |= {"rollback": {"worsening": None, "spike_minimum": 15, "conservative": 1000}}
    tamiyo = esper.Tamiyo("schedule", kasmina=kasmina, settings=settings, targets=["net.3"])
    saboteur, module = OneRank(case, tamiyo, kind, ranks), Net("lambda")
    made = Trainer(
        callbacks=[saboteur, tamiyo, faults.Moment(saboteur)],
        max_steps=steps,
        val_check_interval=5,
        strategy=strategy(),
        devices=ddp_job.SIZE,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        **QUIET,
    )
    made.fit(module, datamodule=Digits(batch_size=32, train=640))
    backs = [event for event in saboteur.events if isinstance(event, faults.RolledBack)]
    return {
        "wrong": [*saboteur.wrong, *faults._aftermath(case, saboteur, module, [event.trigger for event in backs])],
        "backs": [[event.trigger.value, event.step, event.restored_step, *event.locked_seeds] for event in backs],
        "told": [event.detail for event in backs],
        "random at the snapshot": [saboteur.known[event.restored_step]["random"] for event in backs],
        "weights": bit_sum(module.parameters()),
        "states": [view.state.value for view in tamiyo.morphable.seeds],
        "groups": len(made.optimizers[0].param_groups),
    }


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}

# --- signals -----------------------------------------------------------------------------------------------------


class Asked(Callback):
    """Sends SIGTERM to this process, once, after so many batches: in a backward pass, or in a validation."""

    def __init__(self, at: dict[int, int], *, validating: bool = False) -> None:
        self.at, self.validating = at.get(ddp_job.RANK), validating

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.send(trainer, not self.validating)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.send(trainer, self.validating)

    def send(self, trainer: Trainer, here: bool) -> None:
        if here and self.at is not None and trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.at:
            self.at = None
            os.kill(os.getpid(), signal.SIGTERM)


STOPS: dict[str, tuple[dict[int, int], bool]] = {
    "one": ({1: 13}, False),
    "all": ({0: 17, 1: 18}, False),
    "validation": ({0: 20}, True),
}
"""After how many batches which rank is asked to stop, and whether it is validating then."""


def stopped(folder: Path) -> dict[str, Any]:
    """Runs that are asked to stop, each resumed in its own folder; and the uninterrupted one."""
    found = {"whole": dropping(folder / "whole")}
    for name, (at, validating) in STOPS.items():
        module = Dropping()
        try:
            dropping(folder / name, module, more=[Asked(at, validating=validating)])
        except SystemExit as ended:
            found[name] = {"code": ended.code, "losses": module.train_losses}
        found[f"{name} resumed"] = dropping(folder / name, ckpt=folder / name / "checkpoints" / "interrupted.ckpt")
    return found


def dropping(folder: Path, module: Dropping | None = None, **given: Any) -> dict[str, Any]:
    """A small run whose steps take two batches and draw random numbers."""
    settings = planting(at=3)
    return fit(folder, module=module or Dropping(), settings=settings, epochs=3, accumulate_grad_batches=2, **given)


# --- layers that another takes the place of ----------------------------------------------------------------------


class Normed(Plain):
    """Has a layer that `sync_batchnorm` replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = nn.BatchNorm1d(16)


class OverRanks(nn.BatchNorm1d):
    """Takes mean and variance over all ranks, as torch's SyncBatchNorm does, which wants a GPU; no gradient to them."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean = self.over_ranks(x)
        variance = self.over_ranks((x - mean).square())
        self.running_mean.lerp_(mean, 0.1)
        self.running_var.lerp_(variance, 0.1)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias

    def over_ranks(self, x: Tensor) -> Tensor:
        mean = x.detach().mean(0)
        dist.all_reduce(mean)
        return mean / dist.get_world_size()


class Synced(LayerSync):
    """What `sync_batchnorm=True` does, with layers that run on a CPU."""

    def apply(self, model: nn.Module) -> nn.Module:
        return self.swap(model, OverRanks(16))

    def revert(self, model: nn.Module) -> nn.Module:
        return self.swap(model, nn.BatchNorm1d(16))

    def swap(self, model: Any, layer: nn.Module) -> nn.Module:
        layer.load_state_dict(model.net[1].state_dict())
        model.net[1] = layer
        return model


def synced(folder: Path) -> dict[str, Any]:
    """A run whose normalisation is shared by the ranks; torch's own; and one that had grown a child there before."""
    grow = {"settings": planting(at=5) | {"schedule": ({"at": 5, "blueprint": "BP-PROJ-IA3", "site": "net.1"},)}}
    refused = Refused()
    found = {"synced": fit(folder / "synced", module=Normed(), plugins=[Synced()], epochs=4, more=[refused])}
    found["synced"]["refused"] = refused.found
    fit(folder / "grown", module=Normed(), epochs=2, **grow)
    ckpt = folder / "grown" / "checkpoints" / "epoch=0.ckpt"
    tries = {
        "torch's own": {"sync_batchnorm": True},
        "grown there": {"plugins": [Synced()], "ckpt": ckpt, **grow},
    }
    for name, given in tries.items():
        try:
            fit(folder / name, module=Normed(), epochs=2, **given)
        except (ValueError, esper.EsperError) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return found


class Refused(Callback):
    """Notes which sites take no seeds, and why."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found = dict(next(c for c in trainer.callbacks if isinstance(c, esper.Tamiyo)).bank.refused)


# -----------------------------------------------------------------------------------------------------------------

JOBS = {"culled": culled, "back": back, "stopped": stopped, "synced": synced}


def events(folder: Path) -> dict[str, Any]:
    return {name: job(folder) for name, job in JOBS.items()}


if __name__ == "__main__":
    ddp_job.RANK, ddp_job.SIZE = ddp_job.prepare()
    out, named = Path(sys.argv[1]), sys.argv[2]
    ddp_job.tell(events(out) if named == "events" else {named: JOBS[named](out)}, out)
    if "endless" in sys.argv:
        keep = ModelCheckpoint(out / "endless" / "checkpoints", every_n_train_steps=10**6)
        ddp_job.endless(out / "endless", keep, timeout_s=60.0)
