"""Inject faults into running fits, and compare what comes back with the snapshot, bit for bit.

Each case is a fit of its own: a small network with dropout and batch normalisation grows a child on the digits, and at
one point of the child's life something is broken. When the run says that it went back, every parameter, buffer, moment,
learning rate, scheduler, scaler, random stream, seed and decision is compared with what it was when the snapshot was
taken; then the run must reach its end with finite losses, the seed that was under way locked, and its report written.

    python benchmarks/faults.py                                   # 100 faults
    python benchmarks/faults.py --write benchmarks/results/faults.md
"""

import argparse
import hashlib
import json
import logging
import math
import platform
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.data import Digits
from esper.kasmina.kernels import Kernel, KernelRequest
from esper.kasmina.library_store import LibraryKernelStore
from esper.leyline.events import RollbackTrigger, RolledBack
from esper.leyline.states import Reason
from esper.tolaria.checkpoint import random_state

STAGES = ("none", "LOADING", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED")
SCHEDULERS = ("lambda", "cosine", "onecycle", "plateau")
VARIANTS = ("plain", "reconstruction", "accumulate", "scaler", "ema")
FAULTS = {
    "loss is NaN": RollbackTrigger.NON_FINITE_LOSS,
    "weight is infinite": RollbackTrigger.NON_FINITE_LOSS,
    "moment is NaN": RollbackTrigger.NON_FINITE_LOSS,
    "weights times 1000": RollbackTrigger.LOSS_SPIKE,
    "one step at 1000 times the learning rate": RollbackTrigger.LOSS_SPIKE,
    "state arrays overwritten": RollbackTrigger.STATE_CORRUPTION,
    "Tamiyo's signal": RollbackTrigger.REQUESTED,
    "asked for by hand": RollbackTrigger.REQUESTED,
    "loss is NaN, three times in a row": RollbackTrigger.NON_FINITE_LOSS,
}
TAMIYO = {"schedule": ({"at": 35, "blueprint": "BP-MLP-GELU", "site": "net.3", "params": 600},), "budget": 5000}
IN_PROGRESS = STAGES[1:7]


class Case(NamedTuple):
    """One fault: what breaks, in which stage of the child's life, in what kind of run."""

    fault: str
    stage: str
    scheduler: str = "lambda"
    variant: str = "plain"
    offset: int = 3

    def __str__(self) -> str:
        """Return all five in one line."""
        return ", ".join(map(str, self))


class Outcome(NamedTuple):
    """What became of a case: the triggers that fired, and everything that is not as it should be."""

    case: Case
    triggers: tuple[str, ...]
    wrong: tuple[str, ...]


class Net(LightningModule):
    """A small network that draws random numbers and keeps running statistics."""

    def __init__(self, scheduler: str) -> None:
        """Make it, always with the same weights."""
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Dropout(0.1), nn.Linear(16, 10)
        )
        self.scheduler, self.poison, self.losses = scheduler, False, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss, or NaN when told to."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        loss = loss * math.nan if self.poison else loss
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the decision loss."""
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """Return AdamW with one of the schedulers."""
        optimizer, lr = torch.optim.AdamW(self.parameters(), lr=3e-3), torch.optim.lr_scheduler
        made: Any = {
            "lambda": lambda: lr.LambdaLR(optimizer, lambda step: 0.99**step),
            "cosine": lambda: lr.CosineAnnealingLR(optimizer, 150),
            "onecycle": lambda: lr.OneCycleLR(optimizer, 6e-3, total_steps=300),
            "plateau": lambda: lr.ReduceLROnPlateau(optimizer, patience=1, factor=0.7),
        }[self.scheduler]()
        plan = {"scheduler": made, "interval": "step"} if self.scheduler != "plateau" else {"scheduler": made}
        return {"optimizer": optimizer, "lr_scheduler": plan | {"monitor": "val_loss"}}


class SlowStore(LibraryKernelStore):
    """Lets a seed wait in LOADING."""

    waits = 4

    def poll(self, request: KernelRequest) -> Kernel | None:
        """Say 'not yet' a few times."""
        self.waits -= 1
        return super().poll(request) if self.waits < 0 else None


def digest(value: Any) -> str:
    """Return a hash of the bits of a nest of tensors, containers and plain values."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in value:
            sha.update(repr(key).encode())
            _feed(sha, value[key])
    elif isinstance(value, list | tuple):
        sha.update(f"{len(value)}".encode())
        for item in value:
            _feed(sha, item)
    else:
        sha.update(repr(value).encode())


def fingerprint(trainer: Trainer, tamiyo: esper.Tamiyo) -> dict[str, str]:
    """Return a hash of each part of a fit's state."""
    module, bank, controller = trainer.lightning_module, tamiyo.bank, tamiyo.controller
    assert controller is not None and tamiyo._stepper is not None
    averages = [c._average_model.state_dict() for c in trainer.callbacks if isinstance(c, EMAWeightAveraging)]
    history = tamiyo.tally.state_dict()
    # The report on a seed that an earlier emergency ended is no part of the snapshot, and must not be forgotten.
    reports = [r.model_dump() for r in controller.reports if r.reason is not Reason.EMERGENCY]
    parts = {
        "weights": dict(module.named_parameters()),
        "trains": [p.requires_grad for p in module.parameters()],
        "buffers": dict(module.named_buffers()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "scaler": trainer.precision_plugin.state_dict(),
        "random": random_state(),
        "seeds": [bank.topology(), dict(bank.rows), bank.births, bank.arrays.columns, bank.arrays.crc],
        "steps": tamiyo._stepper.state_dict(),
        "tamiyo": [controller.losses, controller.explanations, reports],
        "tally": [history["history"], history["loss"][:2]],
        "averages": averages,
    }
    return {name: digest(part) for name, part in parts.items()}


class Saboteur(Callback):
    """Breaks one thing once, at a point of the child's life; notes what the state was, and whether it came back."""

    def __init__(self, case: Case, tamiyo: esper.Tamiyo) -> None:
        """Break nothing yet."""
        self.case, self.tamiyo = case, tamiyo
        self.known: dict[int, dict[str, str]] = {}
        self.wrong: list[str] = []
        self.events: list[Any] = []
        self.batches, self.left = 0, 3 if "three times" in case.fault else 1
        self.under_way, self.broken_at = "", -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold seeds in EVALUATING where that is the stage."""
        self.trainer = trainer
        if self.case.stage == "EVALUATING":
            self.tamiyo.controller.evidence = lambda names: {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note the state as the snapshot will see it."""
        assert self.tamiyo._emergency is not None
        if self.tamiyo._emergency.due:
            self.known[trainer.global_step] = fingerprint(trainer, self.tamiyo)

    def act(self, module: Any, step: int) -> None:
        """Break it if the time has come; called when the snapshot has been taken, before the forward."""
        records = self.tamiyo.bank.records.values()
        here = "none" if not records else next(iter({r.state for r in records} & {self.case.stage}), "")
        self.batches += here == self.case.stage and (here != "none" or step > 16)
        module.poison = False
        if self.left and self.batches > self.case.offset:
            self.left, self.broken_at = self.left - 1, self.trainer.global_step
            self.under_way = self.under_way or "".join(r.seed_id for r in records if r.state in IN_PROGRESS)
            self._break(module, self.trainer.optimizers[0])

    def _break(self, module: Any, optimizer: Any) -> None:
        fault, bank = self.case.fault, self.tamiyo.bank
        weights = [p for p in optimizer.param_groups[0]["params"] if p.dim() > 1]
        with torch.no_grad():
            if "loss is NaN" in fault:
                module.poison = True
            elif fault == "weight is infinite":
                weights[-1][0, 0] = math.inf
            elif fault == "moment is NaN":
                optimizer.state[weights[-1]]["exp_avg"].fill_(math.nan)
            elif fault == "weights times 1000":
                weights[-1].mul_(1000)
            elif fault == "one step at 1000 times the learning rate":
                for group in optimizer.param_groups:
                    group["lr"] *= 1000
            elif fault == "state arrays overwritten":
                name = ("lifecycle", "alpha", "kernel_hash")[self.case.offset % 3]
                bank.arrays.columns[name][0] += 1
        if fault == "asked for by hand":
            self.tamiyo.controller.request_rollback("asked for by hand")
        if fault == "Tamiyo's signal":
            # A decision loss that no healthy run has: what Tamiyo sees at the next boundary.
            self.tamiyo.controller._alarm = self._alarm

    def _alarm(self) -> str:
        del self.tamiyo.controller._alarm
        return "the decision loss is far worse than before the graft"

    def hear(self, message: Any) -> None:
        """Compare, at the very moment when everything has been put back and nothing has been done since."""
        self.events.append(message)
        if isinstance(message, RolledBack):
            now, then = fingerprint(self.trainer, self.tamiyo), self.known[message.restored_step]
            self.wrong += [f"{name} differs" for name in now if now[name] != then[name]]
            gradients = [p for p in self.trainer.lightning_module.parameters() if p.grad is not None]
            self.wrong += ["gradients are left"] if gradients else []


class Moment(Callback):
    """Stands behind Tamiyo, so that its saboteur acts between the snapshot and the forward of a batch."""

    def __init__(self, saboteur: Saboteur) -> None:
        """Remember whose moment it is."""
        self.saboteur = saboteur

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Let it act."""
        self.saboteur.act(pl_module, trainer.global_step)


def run(case: Case, folder: Path) -> Outcome:
    """Train with one fault and say what came of it."""
    kasmina = {"training_steps": 12, "ramp_steps": 12, "stabilization_steps": 10, "fine_tuning_steps": 10}
    if case.variant == "reconstruction":
        kasmina |= {"training_objective": "reconstruction"}
    settings = TAMIYO | {"price_per_kparam": 0.0, "min_effect": 0.0, "decision_samples": 32, "confidence": 0.501}
    settings |= {"rollback": {"worsening": None, "spike_minimum": 15, "conservative": 1000}}
    store = SlowStore() if case.stage == "LOADING" else None
    tamiyo = esper.Tamiyo("schedule", store=store, kasmina=kasmina, settings=settings, targets=["net.3"])
    saboteur, module = Saboteur(case, tamiyo), Net(case.scheduler)
    tamiyo.bus = saboteur.hear
    trainer = _trainer(case, folder, [saboteur, tamiyo, Moment(saboteur)])
    try:
        trainer.fit(module, datamodule=Digits(batch_size=64, train=640))
    finally:
        if store is not None:
            store.close()
    found = [event.trigger for event in saboteur.events if isinstance(event, RolledBack)]
    wrong = [*saboteur.wrong, *_aftermath(case, saboteur, module, found)]
    return Outcome(case, tuple(t.value for t in found), tuple(wrong))


def _trainer(case: Case, folder: Path, callbacks: list[Any]) -> Trainer:
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=7))
    given: dict[str, Any] = {"plugins": [scaler]} if case.variant == "scaler" else {}
    given |= {"accumulate_grad_batches": 2} if case.variant == "accumulate" else {}
    return Trainer(
        callbacks=[*callbacks, *([EMAWeightAveraging(decay=0.9)] if case.variant == "ema" else [])],
        max_steps=125,
        val_check_interval=5 * (1 + (case.variant == "accumulate")),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0 if case.offset % 2 else None,
        **given,
    )


def _aftermath(case: Case, saboteur: Saboteur, module: Net, found: list[RollbackTrigger]) -> Iterator[str]:
    """Yield what is wrong at the end of the run."""
    controller = saboteur.tamiyo.controller
    if saboteur.left:
        yield f"the run never came to {case.stage}"
    expected = _expected(saboteur)
    if found != [FAULTS[case.fault]] * expected:
        yield f"rolled back for {found}, not {expected} times for {FAULTS[case.fault]}"
    if not all(bool(torch.isfinite(p).all()) for p in module.parameters()) or not math.isfinite(module.losses[-1]):
        yield "the run did not recover"
    if case.stage not in IN_PROGRESS:
        return
    locked = [view.seed_id for view in saboteur.tamiyo.morphable.seeds if view.state.value == "ROLLED_BACK"]
    told = [r.seed_id for r in controller.reports if r.outcome.value == "ROLLED_BACK"]
    lines = Path(controller.bank and saboteur.trainer.default_root_dir, "fieldreports.jsonl").read_text().splitlines()
    written = [entry["seed_id"] for entry in map(json.loads, lines) if entry["outcome"] == "ROLLED_BACK"]
    if not [saboteur.under_way] == locked == told == written:
        yield f"{saboteur.under_way} was under way; locked are {locked}, reported {told}, written {written}"


def _expected(saboteur: Saboteur) -> int:
    """Return how many times the run must go back."""
    if "learning rate" in saboteur.case.fault:
        # A snapshot right behind the bad step, before a loss tells of it, holds the damage; then it goes further back.
        return 1 + (saboteur.broken_at + 1 in saboteur.known)
    return 3 if "three times" in saboteur.case.fault else 1


def cases(count: int) -> list[Case]:
    """Return that many different cases: every fault in every stage, over the schedulers and the kinds of runs."""
    return list(islice(_cases(), count))


def _cases() -> Iterator[Case]:
    draw, number = random.Random(0), 0
    while True:
        for stage in STAGES:
            for fault in FAULTS:
                # A step that is far too large overflows float16, which is another trigger.
                few = tuple(v for v in VARIANTS if v != "scaler") if "learning rate" in fault else VARIANTS
                variant = few[(number // 3) % len(few)]
                yield Case(fault, stage, SCHEDULERS[number % len(SCHEDULERS)], variant, draw.randrange(2, 5))
                number += 1


def table(outcomes: list[Outcome]) -> str:
    """Return the results as Markdown: one line per kind of fault."""
    lines = ["| fault | trigger | injected | restored bit for bit | failures |", "|---|---|--:|--:|--:|"]
    for fault, trigger in FAULTS.items():
        mine = [o for o in outcomes if o.case.fault == fault]
        failed = sum(bool(o.wrong) for o in mine)
        lines.append(f"| {fault} | {trigger} | {len(mine)} | {len(mine) - failed} | {failed} |")
    failed = sum(bool(o.wrong) for o in outcomes)
    lines.append(f"| **all** | | **{len(outcomes)}** | **{len(outcomes) - failed}** | **{failed}** |")
    for name, values in (("stage", STAGES), ("scheduler", SCHEDULERS), ("variant", VARIANTS)):
        counts = Counter(getattr(o.case, name) for o in outcomes)
        lines.append(f"\nFaults by {name}: " + ", ".join(f"{value} {counts[value]}" for value in values) + ".")
    return "\n".join(lines)


def report(outcomes: list[Outcome]) -> str:
    """Return the whole document."""
    restorations = sum(len(o.triggers) for o in outcomes)
    return (
        "# Faults injected into running fits\n\n"
        f"Command: `python benchmarks/faults.py`. torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, one thread. Each fault is a fit of its own; {restorations} restorations in all, each "
        "compared with its snapshot: weights, buffers, moments, groups, schedulers, scaler, random streams, seeds, "
        "Tamiyo. A failure is any difference, a missing or false trigger, a seed under way that is "
        f"not locked or not reported, or a run that does not recover.\n\n{table(outcomes)}\n"
    )


def main() -> int:
    """Run, print, and tell whether every restoration was exact."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="faults to inject")
    parser.add_argument("--write", type=Path, help="Markdown file for the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "esper"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    outcomes = []
    for number, case in enumerate(cases(args.count)):
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(run(case, Path(folder)))
        print(f"{number + 1}/{args.count} {case}: {'; '.join(outcomes[-1].wrong) or 'exact'}", flush=True)
    print(table(outcomes))
    if args.write:
        args.write.write_text(report(outcomes), encoding="utf-8")
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
