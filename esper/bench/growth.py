"""Runs a bench: the heuristic run of each seed first, whose work the others then get; and leaves what it came to."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from esper.bench.arms import ARMS, GROWN, Plan
from esper.bench.experiment import Experiment
from esper.bench.picture import draw
from esper.bench.pool import Failed, Pool, Result
from esper.bench.progress import BenchProgress
from esper.bench.results import Results
from esper.bench.rows import Job, Row, Rows, write
from esper.bench.table import PICTURE, markdown
from esper.files import replacing

ROWS, RUNS = "rows", "runs"
SUMMARY, TEXT = "growth.json", "growth.md"

_BY_CHILDREN: Final = "the host with widening children from step 0, as no net was named"


@dataclass(frozen=True)
class Bench:
    """What is asked for.

    Args:
        experiment: what is benched.
        arms: names of the arms; the heuristic one is always among them.
        seeds: of the runs.
        folder: of everything that is written.
        jobs: rows at a time.
    """

    experiment: Experiment
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    folder: Path
    jobs: int = 1

    @property
    def wide(self) -> str:
        """What the static wide net is, for people."""
        return ", ".join(self.experiment.comparison.wide) or _BY_CHILDREN

    def first(self) -> list[Job]:
        """Return the heuristic run of each seed."""
        return [Job(GROWN, seed, ARMS[GROWN].make(Plan(self.experiment.config(seed)))) for seed in self.seeds]

    def after(self, seed: int, found: Row) -> list[Job]:
        """Return what the heuristic run of a seed makes possible: every other arm."""
        experiment = self.experiment
        plan = Plan(experiment.config(seed), experiment.wide(seed), experiment.comparison.schedule, found)
        work = float(found["train_macs"])
        others = [(name, ARMS[name]) for name in self.arms if name != GROWN]
        return [Job(name, seed, arm.make(plan), work if arm.equal else None) for name, arm in others]


class Run:
    """One carrying-out of a bench.

    Args:
        bench: what is asked for.
        console: where progress is told.
        pool: makes rows; None makes them in processes of their own.
    """

    def __init__(self, bench: Bench, console: Console, pool: Pool | None = None) -> None:
        """Look at nothing yet."""
        self.bench, self.console = bench, console
        self.rows = Rows(bench.folder / ROWS)
        self.pool = pool or Pool(self.rows, bench.folder / RUNS, jobs=bench.jobs)
        self.results = Results(bench.experiment.name, wide=bench.wide)
        self._alike: dict[str, list[Job]] = {}

    def __call__(self) -> Results:
        """Make every row that is not there, and return all of them."""
        first = self.bench.first()
        missing = self._take(first)
        for job in first:
            row = self.results.rows.get((job.arm, job.seed))
            missing += self._take(self.bench.after(job.seed, row)) if row else []
        self._announce()
        with BenchProgress(self.console, self._total, self.bench.jobs, list(self.results.rows.values())) as progress:
            progress.show(self._done, self._todo())
            for job, result in self.pool.run(missing, self._then):
                self._note(job, result)
                progress.tell(job, result)
                progress.show(self._done, self._todo())
        return self.results

    @property
    def _total(self) -> int:
        return len(self.bench.arms) * len(self.bench.seeds)

    @property
    def _done(self) -> int:
        return len(self.results.rows) + len(self.results.failed)

    def _todo(self) -> Counter[str]:
        wanted = [(arm, seed) for arm in self.bench.arms for seed in self.bench.seeds]
        return Counter(arm for arm, seed in wanted if not {(arm, seed)} & {*self.results.rows, *self.results.failed})

    def _announce(self) -> None:
        there = len(self.results.rows)
        told = f"; {there} of {self._total} rows are there" if there else ""
        arms, seeds = len(self.bench.arms), len(self.bench.seeds)
        sizes = f"{arms} arm{'' if arms == 1 else 's'}, {seeds} seed{'' if seeds == 1 else 's'}"
        self.console.print(f"{self.bench.experiment.name}: {sizes}{told}.", highlight=False)

    def _take(self, jobs: Sequence[Job]) -> list[Job]:
        """Take the rows of jobs that are there, and return the others; of jobs that are the same run only one."""
        missing = []
        for job in jobs:
            row = self.rows.find(job)
            if row is not None:
                self.results.rows[job.arm, job.seed] = row
            elif job.key in self._alike:
                self._alike[job.key].append(job)
            else:
                self._alike[job.key] = [job]
                missing.append(job)
        return missing

    def _then(self, job: Job, row: Row) -> list[Job]:
        return self._take(self.bench.after(job.seed, row)) if job.arm == GROWN else []

    def _note(self, job: Job, result: Result) -> None:
        for same in self._alike[job.key]:
            if isinstance(result, Failed):
                self.results.failed[same.arm, same.seed] = result.why
            else:
                self.results.rows[same.arm, same.seed] = result | {"arm": same.arm}
        if isinstance(result, Failed) and job.arm == GROWN:
            for arm in self.bench.arms:
                self.results.failed.setdefault((arm, job.seed), f"no {GROWN} run of this seed")


def leave(results: Results, folder: Path, command: str) -> None:
    """Write `growth.json`, `growth.md` and `growth.png`.

    Raises:
        OutputError: the folder cannot be written.
    """
    write(folder / SUMMARY, results.plain() | {"command": command, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    with replacing(folder / TEXT) as file:
        file.write(markdown(results, command).encode())
    draw(results, folder / PICTURE)


def chosen(arms: Sequence[str]) -> tuple[str, ...]:
    """Return arms in the order of the tables, with the one that sets the compute of the others.

    Example:
        >>> chosen(["from_start", "off"])
        ('heuristic', 'off', 'from_start')
    """
    return tuple(name for name in ARMS if name in {GROWN, *arms})
