"""Kill a training process again and again, and compare what comes out: `python benchmarks/kills.py [--write FILE]`.

A tiny run that germinates, ramps, judges, keeps and culls is trained once without interruption and once in a process
that is killed (SIGKILL), asked to end (SIGTERM) or interrupted (SIGINT) at random times, some of them while it writes
a checkpoint, and each time resumed from the newest good checkpoint until it ends. Compared bit for bit: the loss of
every step of every attempt, final weights, optimizer state, history, decision log and field reports.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOSSES, RESULT, KEPT = "losses.jsonl", "result.json", "checkpoints"
JOURNALS = ("events.jsonl", "fieldreports.jsonl")
EXPECTED = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
KINDS = ("mlp", "strict", "bytelm")
STEPS = 240
PRELOADED = ["lightning.pytorch", "esper.data", "esper.models", "esper.tolaria.module", "esper.tamiyo.callback"]


# --- the process that is killed ----------------------------------------------------------------------------------


def train(kind: str, folder: Path, steps: int) -> None:
    """Train to the end, from the newest good checkpoint of the folder if there is one, and write down what came out."""
    import warnings

    import torch
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from esper.quiet import quiet
    from esper.tolaria.checkpoint import digests
    from esper.tolaria.resume import newest

    quiet()
    warnings.filterwarnings("ignore", message=".*LeafSpec|.*isinstance.treespec")
    torch.set_num_threads(1)

    class Losses(Callback):
        """Appends the loss of every step, exactly."""

        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
            with (folder / LOSSES).open("a") as file:
                file.write(json.dumps([trainer.global_step, float(outputs["loss"].detach()).hex()]) + "\n")

    torch.manual_seed(0)
    module, data, tamiyo = _parts(kind, folder)
    found = newest(folder / KEPT)
    keep = ModelCheckpoint(folder / KEPT, every_n_train_steps=3, enable_version_counter=False)
    trainer = Trainer(
        max_steps=steps,
        val_check_interval=10,
        check_val_every_n_epoch=None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[tamiyo, Losses(), keep],
    )
    trainer.fit(module, datamodule=data, ckpt_path=found)
    state = {
        f"{n}.{key}": value for n, s in trainer.optimizers[0].state_dict()["state"].items() for key, value in s.items()
    }
    outcome = {"weights": digests(module.state_dict()), "optimizer": digests(state), "history": tamiyo.history}
    part = folder / "result.part"
    part.write_text(json.dumps(outcome))
    part.replace(folder / RESULT)


def _parts(kind: str, folder: Path) -> tuple[Any, Any, Any]:
    """Return module, data and callback of a kind of run."""
    import torch

    import esper
    from esper.data import ByteText, Digits
    from esper.models import MLP, ByteLM
    from esper.tolaria.module import TolariaModule
    from esper.tolaria.tasks import Classification, LanguageModeling

    seeds: dict[str, Any] = {"ramp_steps": 10, "stabilization_steps": 15, "telemetry_every": 3, "embargo_steps": 20}
    if kind == "strict":
        seeds |= {"preset": "strict", "training_steps": 15, "fine_tuning_steps": 15}
    settings = {"start": 15, "decision_samples": 64, "menu": ["BP-MLP-GELU", "BP-WIDEN"]}
    if kind == "bytelm":
        (folder / "text").mkdir(parents=True, exist_ok=True)
        for file in sorted((ROOT / "esper/kasmina").glob("*.py")):
            shutil.copy(file, folder / "text" / file.name)
        network: Any = ByteLM(d_model=16, layers=2, heads=2, ffn=8, context=32)
        data: Any = ByteText(context=32, path=str(folder / "text"), steps_per_epoch=50)
        task: Any = LanguageModeling()
        targets = None
    else:
        network, data, task = MLP(widths=(64, 16, 4, 16, 10)), Digits(batch_size=32), Classification()
        settings |= {"budget": 600, "proxy": 120}
        targets = ["layers.2"]
    module = TolariaModule(
        network=network, task=task, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), warmup_steps=5
    )
    tamiyo = esper.Tamiyo(kasmina=seeds, settings=settings, targets=targets, output_dir=str(folder))
    return module, data, tamiyo


# --- the one that kills ------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a campaign came to."""

    kind: str
    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    mid_write: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def campaign(kind: str, kills: int, folder: Path, *, seed: int = 0, steps: int = STEPS) -> Tally:
    """Kill runs of a kind until so many kills are done, and compare each with the uninterrupted one.

    Args:
        kind: `mlp`, `strict` or `bytelm`.
        kills: how many.
        folder: where the runs write; must not exist.
        seed: chooses times and signals.
        steps: length of each run in training steps.
    """
    tally, chance, started = Tally(kind), random.Random(seed), time.monotonic()
    whole = folder / "whole"
    _wait(_start(kind, whole, steps))
    while sum(tally.kills.values()) < kills:
        run = folder / f"run-{tally.runs}"
        tally.runs += 1
        _run_to_the_end(kind, run, steps, tally, kills, chance)
        tally.failures += [f"run {tally.runs}: {found}" for found in differences(whole, run)]
    tally.seconds = time.monotonic() - started
    return tally


def _run_to_the_end(kind: str, run: Path, steps: int, tally: Tally, kills: int, chance: random.Random) -> None:
    while not (run / RESULT).exists():
        process = _start(kind, run, steps)
        if sum(tally.kills.values()) >= kills:
            _wait(process)
            return
        # SIGKILL leaves no time to tidy up, so it comes most often.
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        while_writing = number is signal.SIGKILL and chance.random() < 0.5
        if _kill(process, run, number, chance, while_writing):
            tally.kills[number.name] += 1
            halves = list((run / KEPT).glob(".*.part"))
            tally.mid_write += bool(halves)
            if process.exitcode != EXPECTED[number] and not (run / RESULT).exists():
                tally.failures.append(f"{number.name} ended with {process.exitcode}: {_last_words(run)}")
        elif process.exitcode != 0:
            tally.failures.append(f"ended by itself with {process.exitcode}: {_last_words(run)}")
            return


def _start(kind: str, run: Path, steps: int) -> BaseProcess:
    """Start a process of its own for a run; it is forked from a server that has torch imported already."""
    run.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_child, args=(kind, run, steps))
    process.start()
    return process


def _child(kind: str, run: Path, steps: int) -> None:
    # A shell that starts a job in the background lets it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, name in ((1, "output.txt"), (2, "errors.txt")):
        os.dup2(os.open(run / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    train(kind, run, steps)


def _wait(process: BaseProcess) -> None:
    process.join(timeout=600)
    if process.exitcode != 0:
        raise RuntimeError(f"the run ended with {process.exitcode}; see errors.txt in its folder")


def _kill(process: BaseProcess, run: Path, number: signal.Signals, chance: random.Random, while_writing: bool) -> bool:
    """Send the signal at a random moment of the training; return whether the process was still there to get it."""
    losses, delay = run / LOSSES, chance.uniform(0.0, 0.7)
    before = losses.stat().st_size if losses.exists() else 0
    while process.is_alive() and not (losses.exists() and losses.stat().st_size > before):
        time.sleep(0.005)
    ends = time.monotonic() + delay
    while process.is_alive() and time.monotonic() < ends:
        time.sleep(0.002)
    ends = time.monotonic() + 2.0
    while while_writing and process.is_alive() and time.monotonic() < ends:
        if any((run / KEPT).glob(".*.part")):
            break
    if not process.is_alive():
        return False
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(timeout=300)
    return True


def _last_words(run: Path) -> str:
    return (run / "errors.txt").read_text(errors="replace")[-600:]


# --- the comparison ----------------------------------------------------------------------------------------------


def differences(whole: Path, run: Path) -> list[str]:
    """Return in what a run differs from the uninterrupted one."""
    if not (run / RESULT).exists():
        return [f"it did not end: {_last_words(run)}"]
    a, b = (json.loads((place / RESULT).read_text()) for place in (whole, run))
    found = [name for name in a if a[name] != b[name]]
    expected, seen = dict(_losses(whole)), _losses(run)
    found += [f"the loss of step {step}" for step, loss in seen if expected.get(step) != loss][:1]
    found += ["steps that were never trained"] if {step for step, _ in seen} != expected.keys() else []
    found += [name for name in JOURNALS if told(whole / name) != told(run / name)]
    return found


def _losses(run: Path) -> list[tuple[int, str]]:
    lines = (run / LOSSES).read_text().splitlines()
    # The last line before a kill may be cut short.
    return [(int(step), loss) for step, loss in map(json.loads, (line for line in lines if line.endswith("]")))]


def told(path: Path) -> list[dict[str, Any]]:
    """Return a journal's lines, without the identifiers that every run draws anew."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: len(v) if k == "commands" else v for k, v in line.items() if k != "run_id"} for line in lines]


# --- the table ---------------------------------------------------------------------------------------------------

_HEAD = """# Kills and resumes

Command: `python benchmarks/kills.py --kills {kills} --steps {steps}`, {cores} cores.

A training process is ended at random times and resumed
from its newest good checkpoint until it reaches the end of its {steps} steps. Then every step's loss of every attempt,
the final weights, the optimizer's state, the history, `events.jsonl` and `fieldreports.jsonl` are compared with those
of a process that nobody disturbed. A failure is any difference, in any bit, or an exit status that does not fit.

| run | kills | SIGKILL | of these while a checkpoint was written | SIGTERM | SIGINT | runs | failures | seconds |
|---|---|---|---|---|---|---|---|---|
"""


def table(tallies: list[Tally], steps: int) -> str:
    """Return the results as Markdown."""
    rows = [_row(t.kind, t) for t in tallies]
    whole = Tally("all")
    for t in tallies:
        whole.kills += t.kills
        whole.runs, whole.mid_write = whole.runs + t.runs, whole.mid_write + t.mid_write
        whole.failures, whole.seconds = whole.failures + t.failures, whole.seconds + t.seconds
    text = (
        _HEAD.format(cores=os.cpu_count(), steps=steps, kills=sum(whole.kills.values()))
        + "\n".join([*rows, _row("**all**", whole)])
        + "\n"
    )
    return text + "".join(f"\n- {failure}" for failure in whole.failures)


def _row(name: str, t: Tally) -> str:
    by = [t.kills[s] for s in ("SIGKILL", "SIGTERM", "SIGINT")]
    cells = [name, sum(by), by[0], t.mid_write, by[1], by[2], t.runs, len(t.failures), round(t.seconds)]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    """Run the campaigns and print, or write, the table; exit status 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--write", type=Path, help="file for the table")
    given = parser.parse_args()
    shares = [given.kills // len(KINDS) + (n < given.kills % len(KINDS)) for n in range(len(KINDS))]
    with tempfile.TemporaryDirectory() as folder:
        tallies = []
        for n, (kind, share) in enumerate(zip(KINDS, shares, strict=True)):
            tallies.append(campaign(kind, share, Path(folder) / kind, seed=n, steps=given.steps))
            print(tallies[-1], file=sys.stderr, flush=True)
    text = table(tallies, given.steps)
    print(text)
    if given.write:
        given.write.write_text(text)
    return int(any(t.failures for t in tallies))


if __name__ == "__main__":
    sys.exit(main())
