"""Does growth pay? Tasks C and D at equal training compute, by the product's own path.

Every arm has the multiply-accumulates of `wide`: host, children, probe passes, decision evaluations and, on D, the
teacher's forward passes are all charged. Decisions read the decision part only; the table shows the report part.

    python benchmarks/growth.py                       # all tasks, arms and 3 seeds; resumable
    python benchmarks/growth.py --tasks C --arms live wide --seeds 0
"""

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import esper
from esper.data import ByteText
from esper.models import ByteLM, MoEByteLM
from esper.models.flops import macs, parameter_count

CACHE = Path("outputs/benchmarks/growth")
ARMS = ("small", "wide", "schedule_gelu", "schedule_conv", "live")
KIND = {"schedule_gelu": "BP-MLP-GELU", "schedule_conv": "BP-CONV-CAUSAL"}
WINDOWS = 32


@dataclass(frozen=True)
class Task:
    """One task: its hosts, its schedule, and what the project's first trials measured."""

    name: str
    small: dict[str, Any]
    wide: dict[str, Any]
    model: type[nn.Module]
    steps: int
    warmup: int
    decay: float
    start: int
    trial: int
    interval: int
    report_windows: int
    teacher: dict[str, Any] | None
    expected: dict[str, str]

    def host(self, arm: str) -> nn.Module:
        """Return a fresh host for an arm."""
        return self.model(**(self.wide if arm == "wide" else self.small))


TASKS = {
    "C": Task(
        name="C",
        model=ByteLM,
        small={"ffn": 16},
        wide={"ffn": 58},
        steps=2400,
        warmup=60,
        decay=0.30,
        start=300,
        trial=200,
        interval=100,
        report_windows=192,
        teacher=None,
        expected={"small": "1.863", "wide": "1.787", "live": "1.724", "schedule_conv": "1.738"},
    ),
    "D": Task(
        name="D",
        model=MoEByteLM,
        small={"expert_width": 16},
        wide={"expert_width": 24},
        steps=600,
        warmup=40,
        decay=0.35,
        start=150,
        trial=100,
        interval=50,
        report_windows=128,
        teacher={"d_model": 128, "layers": 3, "heads": 4, "ffn": 384},
        expected={"small": "2.140", "wide": "2.119", "live": "1.983", "schedule_conv": "1.960"},
    ),
}


@dataclass(frozen=True)
class Account:
    """Compute of a task in MACs of one window forward."""

    host: int
    wide: int
    teacher: int
    budget: int

    @classmethod
    def of(cls, task: Task) -> "Account":
        """Count the hosts; a training step costs three forwards, the teacher's one."""
        window = torch.zeros(1, 128, dtype=torch.long)
        host, wide = macs(task.host("small"), window), macs(task.host("wide"), window)
        teacher = macs(ByteLM(**task.teacher), window) if task.teacher else 0
        return cls(host, wide, teacher, task.steps * 8 * (3 * wide + teacher))

    def step(self, host: int, added: int) -> int:
        """Cost of one training step of eight windows."""
        return 8 * (3 * (host + added) + self.teacher)


def plan_steps(task: Task, arm: str, account: Account, params: int) -> int:
    """Return how many steps the budget allows, assuming that a child costs one MAC per parameter and token."""
    host = account.wide if arm == "wide" else account.host
    spent, steps, child = 0, 0, params * 128
    while True:
        added = 0
        if arm in KIND and steps >= task.start:
            added = child
        if arm == "live" and steps >= task.start:
            added = child
        cost = account.step(host, added)
        if steps % task.interval == task.interval - 1:
            cost += WINDOWS * (host + added)
        if arm == "live" and steps == task.start + task.trial:
            cost += 10 * WINDOWS * (host + added)
        if spent + cost > account.budget:
            return steps
        spent, steps = spent + cost, steps + 1


def tamiyo_settings(task: Task, arm: str, seed: int, params: int, host_params: int) -> dict[str, Any]:
    """Return the controller's settings for an arm."""
    common = {"seed": seed, "budget": params, "start": task.start, "decision_samples": WINDOWS}
    if arm in KIND:
        site = "blocks.0.after_attn"
        entry = {"at": task.start, "blueprint": KIND[arm], "site": site, "params": params}
        return {"policy": "schedule", "schedule": (entry,), **common}
    if arm == "live":
        return {"policy": "heuristic", **common}
    return {"policy": "off", **common}


def run(task: Task, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed and return its row."""
    torch.set_num_threads(1)
    account, begun = Account.of(task), time.time()
    small, wide = parameter_count(task.host("small")), parameter_count(task.host("wide"))
    lightning.seed_everything(seed, verbose=False)
    host, params = task.host(arm), wide - small
    # A scheduled child is judged at the end of the run: the arm asks what it is worth, not whether 200 steps show it.
    patience = task.trial - task.interval if arm == "live" else 10**6
    morphable = esper.wrap(
        host,
        {"stabilization_steps": patience, "ramp_steps": 20},
        targets=["*.after_attn", "*.ffn"],
    )
    settings = tamiyo_settings(task, arm, seed, params, small)
    controller = esper.TamiyoController(morphable, settings)
    steps = plan_steps(task, arm, account, params)
    data = ByteText(seed=seed, steps_per_epoch=task.interval, report_windows=task.report_windows)
    trainer = esper.TolariaTrainer(morphable, controller, trainer_settings(task, steps, seed, arm), data=data)
    _, history = trainer.train()
    controller.close()
    return {
        "task": task.name,
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "host_params": parameter_count(host) - morphable.bank.added_parameters(),
        "params": parameter_count(host) if arm in ("small", "wide") else small + morphable.bank.added_parameters(),
        "compute": spent(history, account, account.wide if arm == "wide" else account.host) / account.budget,
        "report_loss": history[-1]["report_loss"],
        "kept": [r.blueprint for r in morphable.bank.records.values() if r.state == "FOSSILIZED"],
        "seconds": time.time() - begun,
        "explanations": controller.explanations,
    }


def trainer_settings(task: Task, steps: int, seed: int, arm: str) -> dict[str, Any]:
    """Return the trainer's settings for a task."""
    goal: dict[str, Any] = {"class_path": "esper.tolaria.tasks.LanguageModeling"}
    if task.teacher is not None:
        source = {
            "class_path": "esper.tolaria.teacher.CachedTeacher",
            "init_args": {
                "network": {"class_path": "esper.models.ByteLM", "init_args": task.teacher},
                "cache_dir": str(CACHE / "teachers"),
            },
        }
        goal = {"class_path": "esper.tolaria.tasks.Distillation", "init_args": {"teacher": source, "router_z": 0.0}}
    return {
        "task": goal,
        "optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": 3e-3, "weight_decay": 0.01, "betas": [0.9, 0.98]},
        },
        "max_epochs": -1,
        "max_steps": steps,
        "val_check_interval": task.interval,
        "gradient_clip_val": 1.0,
        "warmup_steps": task.warmup,
        "decay": task.decay,
        "accelerator": "cpu",
        "seed": seed,
        "output_dir": str(CACHE / "runs" / f"{task.name}-{arm}-{seed}"),
    }


def spent(history: list[dict[str, float]], account: Account, host: int) -> float:
    """Return the MACs that a run used, from its own record: steps at their real size, every evaluation."""
    total, added, step, samples = 0.0, 0.0, 0.0, 0.0
    for entry in history:
        total += (entry["step"] - step) * account.step(host, int(added))
        evaluated = entry["decision_samples"] - samples + (WINDOWS if entry["step"] > step else 0)
        total += evaluated * (host + max(added, entry["added_macs"]))
        added, step, samples = entry["added_macs"], entry["step"], entry["decision_samples"]
    return total


def cached(task: Task, arm: str, seed: int) -> dict[str, Any]:
    """Return a row from the cache, or run it and keep it."""
    file = CACHE / f"{task.name}-{arm}-{seed}.json"
    if not file.exists():
        row = run(task, arm, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row, indent=1))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def summary(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return one line per task and arm."""
    lines = []
    for name in sorted({row["task"] for row in rows}):
        for arm in ARMS:
            group = [row for row in rows if (row["task"], row["arm"]) == (name, arm)]
            if group:
                lines.append(_line(name, arm, group))
    return lines


def _line(name: str, arm: str, group: list[dict[str, Any]]) -> tuple[str, ...]:
    losses = [row["report_loss"] for row in group]
    kept = sorted({kind.removeprefix("BP-") for row in group for kind in row["kept"]})
    return (
        name,
        arm,
        f"{statistics.mean(losses):.3f} ± {statistics.pstdev(losses):.3f}",
        " ".join(f"{loss:.3f}" for loss in losses),
        TASKS[name].expected.get(arm, ""),
        f"{statistics.mean(row['params'] for row in group):,.0f}",
        f"{statistics.mean(row['compute'] for row in group):.3f}",
        f"{statistics.mean(row['steps'] for row in group):,.0f}",
        ", ".join(kept),
    )


HEAD = ("task", "arm", "report loss, nats", "seeds", "first trials", "parameters", "compute", "steps", "kept")


def gains(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line per task and arm: what it gains on `wide`, seed by seed, beside the first trials' gain."""
    loss = {(r["task"], r["arm"], r["seed"]): r["report_loss"] for r in rows}
    lines = []
    for task in sorted({r["task"] for r in rows}):
        for arm in ("schedule_gelu", "schedule_conv", "live"):
            seeds = sorted(s for t, a, s in loss if (t, a) == (task, arm) and (task, "wide", s) in loss)
            found = [loss[task, "wide", s] - loss[task, arm, s] for s in seeds]
            if not found:
                continue
            known = TASKS[task].expected
            first = f"{float(known['wide']) - float(known[arm]):.3f}" if arm in known else ""
            listed = " ".join(f"{gain:+.3f}" for gain in found)
            lines.append(f"| {task} | {arm} | {statistics.mean(found):+.3f} | {listed} | {first} |")
    return lines


LEVELS = """
## Paired gain on `wide`, nats

| task | arm | mean | seeds | first trials |
|---|---|---|---|---|
{gains}

## Levels

The report part is the first twelfth of the library's files, without those in folders named `test` or `tests`; 192 (C)
and 128 (D) windows spread evenly over it are measured. Which windows the first trials took is not recorded, and that
choice alone moves a level, see [windows.md](windows.md). Reading the rule as leaving
out `test` alone, but not `tests`, puts easier files into the report part and lowers all levels of C and D by about .2.
Gains are paired over the same windows and do not depend on that.
"""


def markdown(lines: list[tuple[str, ...]], rows: list[dict[str, Any]]) -> str:
    """Return the table with its command and machine."""
    text = [
        "# Growth at equal training compute: tasks C and D",
        "",
        "Command: `python benchmarks/growth.py`. Losses are nats per byte on the report part, mean ± population sd;",
        "`compute` is the run's own account of multiply-accumulates as a fraction of static `wide`'s training;",
        "`first trials` is what the project's first measurements, before the product, gave.",
        "",
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()} CPU, one thread a run.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
    ]
    table = "\n".join(text + ["| " + " | ".join(line) + " |" for line in lines]) + "\n"
    return table + LEVELS.format(gains="\n".join(gains(rows)))


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["C", "D"], choices=sorted(TASKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--write", type=Path, help="also write the table as Markdown")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    console, rows = Console(), []
    for seed in given.seeds:
        for name in given.tasks:
            for arm in given.arms:
                rows.append(cached(TASKS[name], arm, seed))
                row = rows[-1]
                console.print(f"{name} {arm} seed {seed}: {row['report_loss']:.4f}, compute {row['compute']:.3f}")
    table = Table(*HEAD)
    for line in summary(rows):
        table.add_row(*line)
    console.print(table)
    if given.write:
        given.write.write_text(markdown(summary(rows), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
