"""Do the pools disturb training? `python benchmarks/disruption.py [--rounds N] [--write FILE]`.

The `bytelm` run, grafts included, with a forge whose pools have no workers ("idle"), with pools that compile and try
out the ten standard blueprints all the while ("busy"), and with idle pools while a plain Python program that has
nothing to do with Esper compiles source text over and over ("control": what sharing the machine costs); the training
process on one core, the pools or the program on the other, in turns.
Per arm: median, 99th percentile and longest step after the first 50, over all rounds; the step after each germination
as a ratio to the median of the 20 steps around it; and how many of the training thread's lookups of a kernel
found one in memory.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from esper.blueprints import STANDARD, load_library
from esper.forge.client import Forge
from esper.forge.link import REQUESTED
from esper.karn.service import reference, stated
from esper.kasmina.forge_store import ForgeStore
from esper.leyline.artifacts import CompilationRequest
from esper.leyline.errors import EsperError
from esper.tamiyo.callback import Tamiyo

STEPS, WARM_UP, AROUND = 1200, 50, 10
CONTROL = """
import pathlib, sysconfig
texts = [p.read_bytes() for p in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))]
while True:
    for text in texts:
        compile(text, "text", "exec")
"""
SETTINGS = [
    "+experiment=bytelm",
    "compare=false",
    "logger=none",
    f"data.init_args.steps_per_epoch={STEPS}",
    "tamiyo.settings.start=200",
    "forge.enabled=true",
    "forge.adopt=any",
    "trainer.enable_progress_bar=false",
]


class StepTimes(Callback):
    """Writes the wall-clock time of every training step, and how the run's cache of kernels did.

    Args:
        file: JSON file to write.
    """

    def __init__(self, file: str) -> None:
        """Start without times."""
        self.file, self.times, self._last = Path(file), list[float](), 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock; validation between two steps is no part of either."""
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop the clock."""
        self.times.append(time.perf_counter() - self._last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        tamiyo = next(c for c in trainer.callbacks if isinstance(c, Tamiyo))  # type: ignore[attr-defined]
        assert tamiyo.controller is not None and isinstance(store := tamiyo.controller.store, ForgeStore)
        compiled, eager = store.cache.counts(), store.eager.cache.counts()
        # What has no compiled kernel is looked up among the eager ones next.
        found = compiled.hits + eager.hits
        told = {"times": self.times, "found": found, "lookups": found + eager.misses}
        self.file.write_text(json.dumps(told), encoding="utf-8")


class Run(NamedTuple):
    """What one run showed.

    Args:
        times: seconds per step.
        moments: steps at which seeds germinated or were planted.
        busy_s: processor time of the pools, in seconds.
        found: lookups of a kernel that found it in memory.
        lookups: all of them.
    """

    times: list[float]
    moments: list[int]
    busy_s: float
    found: int
    lookups: int

    def ratios(self) -> list[float]:
        """Return the step after each moment as a ratio to the median of the steps around it."""
        found = []
        for step in self.moments:
            around = self.times[max(0, step - AROUND) : step] + self.times[step + 1 : step + 1 + AROUND]
            if step < len(self.times) and around:
                found.append(self.times[step] / statistics.median(around))
        return found


def run(folder: Path, arm: str) -> Run:
    """Train once, with what the arm says on the other core."""
    folder.mkdir(parents=True)
    workers = int(arm == "busy")
    forge = Forge(enabled=True, root=str(folder / "forge"))
    callback = f"{{class_path: disruption.StepTimes, init_args: {{file: {folder / 'times.json'}}}}}"
    command = [sys.executable, "train.py", *SETTINGS, f"trainer.callbacks=[{callback}]", f"hydra.run.dir={folder}/run"]
    command += [f"forge.root={folder / 'forge'}", f"forge.tezzeret={workers}", f"forge.urabrask={workers}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    os.sched_setaffinity(0, before)
    with other_program({max(before)}) if arm == "control" else nullcontext():
        busy = attend(process, forge, {max(before)}, flood=workers > 0)
    if process.returncode != 0:
        raise SystemExit(f"the run ended with status {process.returncode}: {' '.join(command)}")
    events = [json.loads(line) for line in next(folder.rglob("events.jsonl")).read_text().splitlines()]
    moments = {e["step"] for e in events if e.get("target") in ("GERMINATED", "TRAINING", "GRAFTING")}
    told = json.loads((folder / "times.json").read_text())
    return Run(told["times"], sorted(moments), busy, told["found"], told["lookups"])


@contextmanager
def other_program(core: set[int]) -> Iterator[None]:
    """Run a program on a core that knows nothing of the training."""
    program = subprocess.Popen([sys.executable, "-c", CONTROL])
    os.sched_setaffinity(program.pid, core)
    try:
        yield
    finally:
        program.kill()
        program.wait()


def attend(process: "subprocess.Popen[bytes]", forge: Forge, core: set[int], *, flood: bool) -> float:
    """Keep the pools on their core, and busy; return the processor time that they took, in seconds."""
    spent: dict[int, float] = {}
    flooded = False
    while process.poll() is None:
        card = forge.running()
        if card is not None:
            with suppress(psutil.Error):
                root = psutil.Process(card["pid"])
                for child in [root, *root.children(recursive=True)]:
                    with suppress(psutil.Error):
                        child.cpu_affinity(sorted(core))
                        used = child.cpu_times()
                        spent[child.pid] = used.user + used.system
            if flood and not flooded:
                flooded = ask_for_everything(forge)
        time.sleep(0.2)
    return sum(spent.values())


def ask_for_everything(forge: Forge) -> bool:
    """Ask for a compiled kernel of every standard blueprint; tell whether the forge heard it."""
    try:
        with forge.connect() as bus:
            for name in STANDARD:
                text = stated(load_library()[name].ir).ir
                bus.publish(CompilationRequest(spec=reference(text), pipeline="standard"), REQUESTED)
    except EsperError:
        return False
    return True


def row(name: str, runs: list[Run]) -> list[float]:
    """Return median, 99th percentile and longest step, in milliseconds."""
    times = sorted(1e3 * t for each in runs for t in each.times[WARM_UP:])
    return [statistics.median(times), times[int(0.99 * len(times))], times[-1]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    arms: dict[str, list[Run]] = {"idle": [], "control": [], "busy": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for arm, runs in arms.items():
                runs.append(run(Path(folder) / f"{arm}{number}", arm))
    numbers = {arm: row(arm, runs) for arm, runs in arms.items()}
    table = Table("pools", "steps", "median ms", "p99 ms", "longest ms", "pools' CPU-s", "grafts", box=MARKDOWN)
    table.add_column("step at a graft / its neighbours: median, most")
    table.add_column("kernels found in memory")
    for arm, runs in arms.items():
        ratios = [ratio for each in runs for ratio in each.ratios()]
        told = f"{statistics.median(ratios):.2f}, {max(ratios):.2f}" if ratios else "none"
        found = f"{sum(r.found for r in runs)} of {sum(r.lookups for r in runs)}"
        busy, steps = f"{sum(r.busy_s for r in runs):.0f}", str(sum(len(r.times) for r in runs))
        table.add_row(arm, steps, *(f"{n:.1f}" for n in numbers[arm]), busy, str(len(ratios)), told, found)
    for other in ("idle", "control"):
        shares = (f"{b / i:.2f}" for i, b in zip(numbers[other], numbers["busy"], strict=True))
        table.add_row(f"busy / {other}", "", *shares, "", "", "", "")
    console = Console(width=160, record=True)
    console.print(table)
    if given.write:
        where = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
        head = f"# What the pools cost training\n\nCommand: `python benchmarks/disruption.py`. {where}, one thread.\n"
        text = (__doc__ or "").partition("\n\n")[2]
        given.write.write_text(f"{head}\n{text}\n{console.export_text()}", encoding="utf-8")


if __name__ == "__main__":
    main()
