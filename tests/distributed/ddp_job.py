"""What one rank of a DDP job does; started by `launch.Job`, one process per rank.

Arguments: the job's folder, the name of the job, and `endless` where it goes on until a rank is lost.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed import distributed_c10d

import esper
from esper.kasmina.kernels import Kernel, KernelRequest, KernelStore
from esper.leyline.codec import to_json
from esper.leyline.errors import KernelError
from esper.nissa.callback import GrowthReport
from esper.tolaria import distributed
from esper.tolaria.exchange import bit_sum
from tests.helpers import QUICK, Plain, digits, trainer

HARMLESS = (
    ".*does not have many workers.*",
    ".*sync_dist.*",
    "The dirpath has changed",
    "Checkpoint directory",
    ".*LeafSpec.*",
    "Be aware that when using `ckpt_path`",
    "Esper: the checkpoint was written by",
)
RANK, SIZE = 0, 1
Deed = Callable[[esper.Tamiyo, LightningModule], None]


class Witness(Callback):
    """Notes at the start and after every epoch what must be the same on all ranks."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.start: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = self.look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(self.look(trainer, pl_module))

    def look(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        tamiyo = next(c for c in trainer.callbacks if isinstance(c, esper.Tamiyo))
        grafts = tamiyo.bank.grafted()
        optimizer = trainer.optimizers[0]
        state = [v for group in optimizer.param_groups for p in group["params"] for v in optimizer.state[p].values()]
        return {
            "step": trainer.global_step,
            "host": bit_sum(pl_module.net.parameters()),
            "children": bit_sum(p for graft in grafts.values() for p in graft.child.parameters()),
            "alphas": [graft.strength for graft in grafts.values()],
            "topology": tamiyo.bank.topology(),
            "optimizer": bit_sum(state),
            "with state": len(optimizer.state),
            "groups": [group.get("esper_seed", "") for group in optimizer.param_groups],
            "requests": len(tamiyo.morphable.requests),
        }


def life() -> dict[str, Any]:
    """Two plantings: one passes its gate, one is culled."""
    kept = {"at": 5, "blueprint": "BP-MLP-GELU", "site": "net.2", "params": 600}
    culled = {"at": 20, "blueprint": "BP-PROJ-IA3", "site": "net.0", "params": 600}
    return {"schedule": (kept, culled), "budget": 5000, "price_per_kparam": 0.0, "decision_samples": 64}


def fit(folder: Path, *, epochs: int = 8, ckpt: Path | None = None, **given: Any) -> dict[str, Any]:
    """Train, and return what this rank has to tell."""
    seed_everything(3, verbose=False)
    module = given.pop("module", None) or Plain()
    settings = given.pop("settings", life())
    kasmina = QUICK | {"telemetry_every": 3} | given.pop("kasmina", {})
    policy, store = given.pop("policy", "schedule"), given.pop("store", None)
    output_dir = given.pop("output_dir", None)
    callback = esper.Tamiyo(
        policy, kasmina=kasmina, settings=settings, targets=["net.*"], store=store, output_dir=output_dir
    )
    more = given.pop("more", [])
    pictures = [GrowthReport(output_dir=str(folder))] if given.pop("draw", False) else []
    witness = Witness()
    made = trainer(folder, callback, epochs=epochs, strategy=strategy(), devices=SIZE, **given)
    made.callbacks += [witness, *pictures, *more]
    made.fit(module, datamodule=digits(batch_size=32, train=640), ckpt_path=ckpt)
    controller = callback.controller
    assert controller is not None
    return {
        "start": witness.start,
        "seen": witness.seen,
        "losses": list(module.train_losses),
        "history": callback.history,
        "reports": [json.loads(to_json(r)) for r in controller.reports],
        "decisions": controller.explanations,
        "rng": torch.rand(3),
        "ignored": sorted(vars(module).get("_ddp_params_and_buffers_to_ignore", ())),
    }


def strategy() -> DDPStrategy | str:
    if SIZE == 1:
        return "auto"
    # With three ranks or more the order of a sum depends on the place in a bucket, and DDP makes new buckets after its
    # first step; a resumed run has the same sums from its first step on only where buckets stay as they are.
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60), find_unused_parameters=SIZE > 2)


def whole(folder: Path) -> dict[str, Any]:
    """A run, the same again, its resumption from an epoch's end and from the middle of one, and a second fit."""
    module = Plain()
    return {
        "first": fit(folder / "one", module=module, more=[every(folder, 25)], draw=True),
        "again": fit(folder / "two"),
        "part": fit(folder / "part", ckpt=folder / "one" / "checkpoints" / "epoch=2.ckpt"),
        "mid": fit(folder / "mid", ckpt=folder / "steps" / "step=25.ckpt"),
        "second": fit(folder / "second", module=module, epochs=2),
    }


def brief(folder: Path) -> dict[str, Any]:
    """A run and its resumption, for many ranks, with a second group for plain values as beside NCCL; and `resized`."""
    distributed._CPU_BACKENDS = ()
    ckpt = folder / "one" / "checkpoints" / "epoch=2.ckpt"
    found = {"first": fit(folder / "one", epochs=5), "part": fit(folder / "part", ckpt=ckpt, epochs=5)}
    return found | resized(folder)


def resized(folder: Path) -> dict[str, Any]:
    """Go on, up to epoch 5, from what another number of ranks has left: at the end of an epoch, and in its middle."""
    left = HANDED_ON[SIZE]
    return {
        name: fit(folder / name, ckpt=folder.parent / path, epochs=5, more=[every(folder, 15)])
        for name, path in left.items()
    }


HANDED_ON = {
    2: {"end": "1/checkpoints/epoch=2.ckpt", "middle": "1/steps/step=55.ckpt"},
    4: {"end": "2/end/checkpoints/epoch=3.ckpt", "middle": "2/steps/step=75.ckpt"},
}
"""The checkpoints that so many ranks go on from. One rank takes 20 steps an epoch, two take 10, and four take 5."""


def every(folder: Path, steps: int) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "steps", every_n_train_steps=steps, save_top_k=-1, filename="{step}")


class Saboteur(Callback):
    """Does something on this rank, once, before the given step."""

    def __init__(self, at: int, deed: Deed, *, ranks: tuple[int, ...]) -> None:
        self.at, self.deed, self.ranks = at, deed, ranks

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if RANK in self.ranks and trainer.global_step == self.at:
            self.at = -1
            self.deed(next(c for c in trainer.callbacks if isinstance(c, esper.Tamiyo)), pl_module)


def break_forward(tamiyo: esper.Tamiyo, module: LightningModule) -> None:
    (graft,) = tamiyo.bank.grafted().values()

    def forward(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"broken on rank {RANK}")

    graft.child.forward = forward


def poison_gradient(tamiyo: esper.Tamiyo, module: LightningModule) -> None:
    (graft,) = tamiyo.bank.grafted().values()
    weight = next(graft.child.parameters())
    weight.register_hook(lambda grad: grad * float("nan"))


def ask(tamiyo: esper.Tamiyo, module: LightningModule) -> None:
    tamiyo.morphable.request_germination("net.2#0.0", "BP-MLP-GELU", "performance_linked")


def drift(tamiyo: esper.Tamiyo, module: LightningModule) -> None:
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1e-7


class NoKernel(KernelStore):
    """Has no kernel at all, as a store whose disk is gone."""

    def prefetch(self, request: KernelRequest) -> None:
        pass

    def poll(self, request: KernelRequest) -> Kernel | None:
        raise KernelError("the disk of rank 1 is gone")

    def evict(self, kernel_id: str) -> None:
        pass

    def close(self) -> None:
        pass


class BadLoss(Plain):
    """The loss of one batch is NaN on rank 1."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if RANK == 1 and len(self.train_losses) == 15 else loss


def trouble(folder: Path) -> dict[str, Any]:
    """Things that happen on one rank only."""
    one = {"settings": {**life(), "schedule": life()["schedule"][:1]}, "epochs": 5}
    found = {
        "raises": fit(
            folder / "raises",
            more=[Saboteur(15, break_forward, ranks=(1,))],
            **one,
        ),
        "nan": fit(
            folder / "nan",
            more=[Saboteur(7, poison_gradient, ranks=(0,))],
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            **one,
        ),
        "asked": fit(
            folder / "asked",
            policy="off",
            settings={"price_per_kparam": 0.0, "budget": 5000},
            epochs=5,
            more=[Saboteur(5, ask, ranks=(0,))],
        ),
        "reconstruction": fit(
            folder / "reconstruction",
            kasmina={"training_objective": "reconstruction", "training_steps": 12, "strategy": "grad_norm_gated"},
            **one,
        ),
        "kernel": fit(folder / "kernel", store=NoKernel() if RANK == 1 else None, **one),
        "rollback": fit(folder / "rollback", module=BadLoss(), **one),
    }
    (folder / "file").touch()
    try:
        fit(folder / "unwritable", output_dir=str(folder / "file" / "run"), **one)
    except esper.EsperError as error:
        found["unwritable"] = {"error": f"{type(error).__name__}: {error}"}
    try:
        fit(folder / "drift", more=[Saboteur(12, drift, ranks=(1,))], **one)
    except esper.EsperError as error:
        found["drift"] = {"error": str(error)}
    return found


JOBS = {"whole": whole, "brief": brief, "trouble": trouble, "resized": resized}


class Alive(Callback):
    """Tells the test that a child is growing."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 15:
            (Path(sys.argv[1]) / f"alive{RANK}").touch()


def endless(folder: Path, *more: Callback, timeout_s: float = 5.0) -> None:
    """Train until the test does something to a rank."""
    # What DDPStrategy(timeout=...) sets; so short it would not bear the skew of starting processes.
    distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), distributed_c10d._get_default_group())
    callback = esper.Tamiyo("schedule", kasmina=QUICK, settings=life(), targets=["net.*"])
    made = trainer(folder, None, epochs=100_000, strategy=strategy(), devices=SIZE, enable_checkpointing=True)
    made.callbacks = [callback, Alive(), *more]
    made.fit(Plain(), datamodule=digits(batch_size=32, train=640))


def tell(results: dict[str, Any], folder: Path) -> None:
    """Write what this rank found; the file is there at once or not at all."""
    torch.save(results, folder / f"rank{RANK}.part")
    (folder / f"rank{RANK}.part").rename(folder / f"rank{RANK}.pt")


def prepare() -> tuple[int, int]:
    """Make this process a strict one; return its rank, and how many there are."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", harmless)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    return int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])


if __name__ == "__main__":
    RANK, SIZE = prepare()
    out = Path(sys.argv[1])
    tell(JOBS[sys.argv[2]](out), out)
    if "endless" in sys.argv:
        endless(out / "endless")
