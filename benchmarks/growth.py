"""Does growth pay? Six tasks at equal training compute, by the product's own path.

Every arm has the multiply-accumulates of `wide`: host, children, search, decision evaluations and, on D, the teacher's
forward passes are all charged. Decisions read the decision part only; the table shows the report part.

    python benchmarks/growth.py                               # all tasks, arms and 5 seeds; resumable
    python benchmarks/growth.py --tasks C --arms live wide --seeds 0
    python benchmarks/growth.py --rows rows.jsonl --jobs 8    # go on with, and add to, rows of another machine
"""

import argparse
import json
import logging
import multiprocessing
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import lightning
import torch
from filelock import FileLock
from growth_table import head, markdown, sentences, summary
from growth_tasks import ALIASES, ARMS, STATIC, TASKS, Account, Task, goal_of
from rich.console import Console
from rich.table import Table

import esper
from esper.leyline.packets import SystemStatePacket
from esper.models import ByteLM
from esper.tamiyo import observe
from esper.tamiyo.contracts import Observation
from esper.tamiyo.menu import Offer
from esper.tamiyo.work import Work
from esper.tolaria.teacher import CachedTeacher

CACHE = Path("outputs/benchmarks/growth")
RAMP = 20
WIDTH = 180
LIVE = ("live", "live_no_best", "live_3", "live_shadow")
POINTS = 3
Row = dict[str, Any]
Key = tuple[str, str, int]


# --- compute --------------------------------------------------------------------------------------------------------


def offers_of(task: Task, settings: dict[str, Any], account: Account) -> list[Offer]:
    """Return what the policy of an arm will plant first, asked of a host of its own."""
    morphable = esper.wrap(task.host("small"), targets=list(task.targets))
    controller = esper.TamiyoController(morphable, settings)
    with torch.no_grad():
        morphable.eval()(task.example())
    observation = Observation(
        packet=SystemStatePacket(run_id="plan", current_epoch=0, global_step=task.start),
        seeds=(),
        sites=observe.sites(morphable.bank),
        reports=(),
        total_steps=task.steps,
        host_params=controller.host_params,
        work=Work(account.small, task.batch, trial_steps=task.trial, judged_on=task.decision),
    )
    offers = controller.policy.foresee(observation)
    controller.close()
    return offers


def reserved(task: Task, arm: str, offers: Sequence[Offer], params: int, step: int) -> int:
    """Return the compute that is kept for children at a step.

    What is planted first is known. What a trial will find is not: one multiply-accumulate per parameter and place is
    assumed, which no kind on the menus but attention exceeds.
    """
    if step < task.start:
        return 0
    if arm in LIVE and step >= task.start + task.trial:
        return max((params * offer.site.shape.tokens for offer in offers), default=0)
    return sum(offer.cost.macs for offer in offers)


def plan_steps(task: Task, arm: str, account: Account, offers: Sequence[Offer], params: int) -> int:
    """Return how many steps the budget allows."""
    last = account.host(arm) + reserved(task, arm, offers, params, task.steps)
    # The last child is measured on and off.
    spent, steps = 0 if arm in STATIC else 2 * task.decision * last, 0
    while True:
        grown = account.host(arm) + reserved(task, arm, offers, params, steps)
        cost = task.batch * (3 * grown + account.teacher)
        if steps % task.interval == task.interval - 1:
            cost += task.decision * grown
        points = POINTS if arm == "live_3" else 1
        if arm in LIVE and (steps - task.start) in (task.trial * n for n in range(1, points + 1)):
            cost += (len(offers) + 1) * task.decision * grown
        if spent + cost > account.budget:
            return steps
        spent, steps = spent + cost, steps + 1


def spent(history: list[dict[str, float]], task: Task, account: Account, host: int) -> float:
    """Return the multiply-accumulates of a run: its own account, the validations, and the teacher."""
    boundaries = [entry for entry in history[:-1] if entry["step"] % task.interval == 0]
    validated = sum(task.decision * (host + entry["added_macs"]) for entry in boundaries)
    return history[-1]["macs"] + validated + history[-1]["step"] * task.batch * account.teacher


# --- one run --------------------------------------------------------------------------------------------------------


def tamiyo_settings(task: Task, arm: str, seed: int, params: int) -> dict[str, Any]:
    """Return the controller's settings for an arm."""
    common = {"seed": seed, "budget": params, "start": task.start, "decision_samples": task.decision}
    if arm in STATIC:
        return {"policy": "off", **common}
    if arm in task.schedules:
        entry = {"at": task.start, "blueprint": task.schedules[arm], "site": task.site, "params": params}
        return {"policy": "schedule", "schedule": (entry,), **common}
    grown = {"menu": task.menu_of(arm), **common}
    if arm not in LIVE:
        return {"policy": "random", **grown}
    points = {"trials": POINTS, "period": task.trial} if arm == "live_3" else {}
    return {"policy": "heuristic", "proxy": task.proxy, **points, **grown}


def kasmina_settings(task: Task, arm: str) -> dict[str, Any]:
    """Return how the children of an arm live; those of a trial are judged at the same step in every arm."""
    if arm not in LIVE:
        # A planted child is judged at the end of the run: the arm asks what it is worth, not whether 200 steps show it.
        return {"stabilization_steps": 10**6, "ramp_steps": RAMP}
    patience = task.trial - task.interval
    if arm == "live_shadow":
        return {"training_steps": patience, "stabilization_steps": 0, "ramp_steps": RAMP}
    return {"stabilization_steps": patience, "ramp_steps": RAMP}


def trainer_settings(task: Task, steps: int, seed: int, arm: str) -> dict[str, Any]:
    """Return the trainer's settings for a task."""
    adam = {"lr": task.lr, "weight_decay": 0.01, "betas": list(task.betas)}
    return {
        "task": goal_of(task, str(CACHE / "teachers")),
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": adam},
        "max_epochs": -1,
        "max_steps": steps,
        "val_check_interval": task.interval,
        "gradient_clip_val": task.clip,
        "warmup_steps": task.warmup,
        "decay": task.decay,
        "accelerator": "cpu",
        "seed": seed,
        "output_dir": str(CACHE / "runs" / f"{task.name}-{arm}-{seed}"),
    }


def teach(task: Task, data: Any) -> None:
    """Train D's teacher for this order of the data if nobody has, one process at a time."""
    if task.teacher is None:
        return
    folder = CACHE / "teachers"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{data.seed}.lock"):
        CachedTeacher(network=ByteLM(**task.teacher), cache_dir=str(folder)).teacher(data)


def run(task: Task, arm: str, seed: int) -> Row:
    """Train one arm with one seed and return its row."""
    torch.set_num_threads(1)
    account, begun = Account.of(task), time.time()
    params = task.parameters("wide") - task.parameters("small")
    settings = tamiyo_settings(task, arm, seed, params)
    offers = [] if arm in STATIC else offers_of(task, settings, account)
    steps = plan_steps(task, arm, account, offers, params)
    data = task.module(seed)
    teach(task, data)
    lightning.seed_everything(seed, verbose=False)
    morphable = esper.wrap(task.host(arm), kasmina_settings(task, arm), targets=list(task.targets))
    controller = esper.TamiyoController(morphable, settings)
    trainer = esper.TolariaTrainer(morphable, controller, trainer_settings(task, steps, seed, arm), data=data)
    _, history = trainer.train()
    controller.close()
    compute = spent(history, task, account, account.host(arm)) / account.budget
    return _row(task, arm, seed, morphable, controller, history) | {
        "steps": steps,
        "compute": compute,
        "seconds": time.time() - begun,
    }


def _row(task: Task, arm: str, seed: int, morphable: Any, controller: Any, history: list[dict[str, float]]) -> Row:
    last = history[-1]
    trained = last["macs"] - last["search_macs"]
    return {
        "task": task.name,
        "arm": arm,
        "seed": seed,
        "settings": task.digest(arm),
        "params": morphable.host_parameters() + morphable.bank.added_parameters(),
        "overhead": last["search_macs"] / trained,
        "decision_loss": last["decision_loss"],
        "report_loss": last["report_loss"],
        "report_accuracy": last.get("report_accuracy"),
        "kept": [r.blueprint for r in morphable.bank.records.values() if r.state == "FOSSILIZED"],
        "trial": [_told(report) for report in controller.reports if report.group.startswith("trial")],
        "explanations": controller.explanations,
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
    }


def _told(report: Any) -> Row:
    found = report.counterfactual
    return {
        "kind": report.blueprint_id,
        "seed_id": report.seed_id,
        "params": report.cost.params,
        "gain": found.mean if found else None,
        "lower": found.lower if found else None,
        "outcome": report.outcome.value,
    }


# --- many runs ------------------------------------------------------------------------------------------------------


class Rows:
    """The rows that are there: one file each in the cache, and one line each in a file that can travel.

    Args:
        file: the travelling file, a row of JSON per line; None keeps the cache alone.
    """

    def __init__(self, file: Path | None) -> None:
        """Read the file."""
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file and file.exists() else []
        self.lines = [json.loads(line) for line in lines if line.strip()]

    def find(self, task: Task, arm: str, seed: int) -> Row | None:
        """Return a row of the task's present settings, or None."""
        cache = _cached(task.name, arm, seed)
        known = [json.loads(cache.read_text(encoding="utf-8"))] if cache.exists() else []
        for row in [*self.lines, *known]:
            if (row["task"], row["arm"], row["seed"], row.get("settings")) == (task.name, arm, seed, task.digest(arm)):
                self._write(row)
                return dict(row)
        return None

    def keep(self, row: Row) -> None:
        """Write a row to both places."""
        cache = _cached(row["task"], row["arm"], row["seed"])
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(row, indent=1), encoding="utf-8")
        self._write(row)

    def _write(self, row: Row) -> None:
        if self.file is None or row in self.lines:
            return
        self.lines.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _cached(task: str, arm: str, seed: int) -> Path:
    return CACHE / f"{task}-{arm}-{seed}.json"


def quiet_run(task: str, arm: str, seed: int) -> Row:
    """Run one row by names, without Lightning's advice."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return run(TASKS[task], arm, seed)


def run_all(wanted: Sequence[Key], jobs: int) -> Iterator[tuple[Key, Row | Exception]]:
    """Run rows, so many at a time in processes of one thread each, and yield each when it is done."""
    if jobs == 1:
        yield from ((key, quiet_run(*key)) for key in wanted)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = {pool.submit(quiet_run, *key): key for key in wanted}
        for done in as_completed(running):
            error = done.exception()
            yield running[done], error if isinstance(error, Exception) else done.result()


def keys_of(tasks: Sequence[str], arms: Sequence[str] | None, seeds: Sequence[int]) -> list[Key]:
    """Return task, arm and seed of each row that is asked for; an arm that a task does not have is left out."""
    wanted = [(TASKS[name], seed) for seed in seeds for name in tasks]
    return [(t.name, arm, s) for t, s in wanted for arm in t.arms if arms is None or arm in {t.arm(a) for a in arms}]


def collect(keys: Sequence[Key], rows: Rows, jobs: int, console: Console) -> tuple[list[Row], bool]:
    """Return all rows that are there or could be made, and whether none failed."""
    found = {key: rows.find(TASKS[key[0]], *key[1:]) for key in keys}
    failed = False
    for key, row in run_all([key for key, row in found.items() if row is None], jobs):
        if isinstance(row, Exception):
            console.print(f"{' '.join(map(str, key))} failed: {row!r}")
            failed = True
            continue
        rows.keep(row)
        found[key] = row
        told = f"{row['report_loss']:.4f}, compute {row['compute']:.3f}, {row['seconds']:.0f} s"
        console.print(f"{row['task']} {row['arm']} seed {row['seed']}: {told}, kept {row['kept']}", soft_wrap=True)
    return [row for row in found.values() if row is not None], not failed


def main() -> int:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=sorted({*ARMS, *ALIASES}), help="all without it")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--rows", type=Path, help="file of rows to go on with and to add to")
    parser.add_argument("--write", type=Path, help="also write the table as Markdown")
    given = parser.parse_args()
    console = Console(width=max(Console().width, WIDTH))
    found, fine = collect(keys_of(given.tasks, given.arms, given.seeds), Rows(given.rows), given.jobs, console)
    table = Table(*head())
    for line in summary(found):
        table.add_row(*line)
    console.print(table)
    for line in sentences(found):
        console.print(line, soft_wrap=True)
    if given.write:
        given.write.write_text(markdown(found), encoding="utf-8")
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
