"""What one rank of a sharded (FSDP2) job does; started by `launch.Job`, one process per rank.

Arguments: the job's folder, the name of the job.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import esper
from esper.tolaria.exchange import bit_sum
from tests.distributed import ddp_job
from tests.distributed.ddp_job import life
from tests.helpers import QUICK, Plain, digits, trainer


class Sharded(Plain):
    """Shards its layers and then itself, as the strategy's manual says."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        if any(isinstance(p, DTensor) for p in self.parameters()):
            return
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class Witness(Callback):
    """Notes after every epoch what must be the same on all ranks, and the whole weights of the host."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tamiyo = next(c for c in trainer.callbacks if isinstance(c, esper.Tamiyo))
        grafts = tamiyo.bank.grafted()
        optimizer = trainer.optimizers[0]
        children = [p for graft in grafts.values() for p in graft.child.parameters()]
        moments = [v for p in children for v in optimizer.state[p].values()]
        host = [p.full_tensor() for p in pl_module.net.parameters()]
        own = [
            v.full_tensor()
            for p in pl_module.net.parameters()
            for v in optimizer.state[p].values()
            if isinstance(v, DTensor)
        ]
        self.seen.append(
            {
                "host": bit_sum(host),
                "host moments": bit_sum(own),
                "children": bit_sum(children),
                "moments": bit_sum(moments),
                "alphas": [graft.strength for graft in grafts.values()],
                "topology": tamiyo.bank.topology(),
                "groups": [group.get("esper_seed", "") for group in optimizer.param_groups],
            }
        )


class BadLoss(Sharded):
    """The loss of one batch is NaN on rank 1."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if ddp_job.RANK == 1 and len(self.train_losses) == 25 else loss


def fit(folder: Path, *, whole_files: bool, epochs: int = 6, ckpt: Path | None = None, **given: Any) -> dict[str, Any]:
    """Train, and return what this rank has to tell."""
    seed_everything(3, verbose=False)
    module = given.pop("module", None) or Sharded()
    kasmina, settings, more = (given.pop(name, default) for name, default in DEFAULTS.items())
    callback = esper.Tamiyo("schedule", kasmina=QUICK | kasmina, settings=settings, targets=["net.*"])
    strategy = ModelParallelStrategy(
        data_parallel_size=ddp_job.SIZE,
        tensor_parallel_size=1,
        save_distributed_checkpoint=not whole_files,
        process_group_backend="gloo",
    )
    witness = Witness()
    made = trainer(folder, callback, epochs=epochs, strategy=strategy, devices=ddp_job.SIZE, **given)
    made.callbacks += [witness, *more]
    made.fit(module, datamodule=digits(batch_size=32, train=640), ckpt_path=ckpt)
    assert callback.controller is not None
    reports = [(report.outcome.value, report.reason.value) for report in callback.controller.reports]
    return {"seen": witness.seen, "losses": list(module.train_losses), "history": callback.history, "reports": reports}


DEFAULTS: dict[str, Any] = {"kasmina": {}, "settings": life(), "more": []}


def sharded(folder: Path) -> dict[str, Any]:
    """A run in each format of checkpoints, and its resumption; and one in which things go wrong on one rank."""
    found = {}
    for name, whole_files in (("full", True), ("distributed", False)):
        found[name] = fit(folder / name, whole_files=whole_files)
        ckpt = folder / name / "checkpoints" / "epoch=2.ckpt"
        found[f"{name} resumed"] = fit(folder / f"{name}_part", whole_files=whole_files, ckpt=ckpt)
    found["trouble"] = fit(
        folder / "trouble",
        whole_files=True,
        epochs=4,
        module=BadLoss(),
        kasmina={"strategy": "drift_controlled"},
        settings=life() | {"schedule": life()["schedule"][:1]},
        more=[ddp_job.Saboteur(15, ddp_job.break_forward, ranks=(1,))],
        gradient_clip_val=0.5,
    )
    return found


JOBS = {"sharded": sharded}

if __name__ == "__main__":
    ddp_job.RANK, ddp_job.SIZE = ddp_job.prepare()
    ddp_job.tell(JOBS[sys.argv[2]](Path(sys.argv[1])), Path(sys.argv[1]))
