"""Carries out the bench: finds the rows that are there, and has the others made."""

import sys
from pathlib import Path
from time import perf_counter
from typing import Final

from rich.console import Console
from rich.text import Text

from esper.bench.pool import Failed, Pool, Result
from esper.bench.progress import duration
from esper.bench.rows import Job, Row, Rows
from esper.bench.stability.parts import Plan, jobs

ROWS, RUNS = "rows", "runs"
WORKER: Final = (sys.executable, "-m", "esper.bench.stability.worker")


class Results:
    """The rows of a bench.

    Args:
        plan: what was asked for.
    """

    def __init__(self, plan: Plan) -> None:
        """Start without rows."""
        self.plan = plan
        self.rows: dict[tuple[str, int], Row] = {}
        self.failed: dict[tuple[str, int], str] = {}
        self.seconds = 0.0

    def of(self, *names: str) -> list[Row]:
        """Return the rows of a part and of what it is made up of, one a seed, in the order of the seeds."""
        arm = "-".join(names)
        return [row for (name, _), row in sorted(self.rows.items()) if name == arm]

    @property
    def versions(self) -> str:
        """What the rows were made with."""
        return "; ".join(sorted({row["versions"] for row in self.rows.values()})) or "nothing ran"


def run(plan: Plan, folder: Path, console: Console, *, at_a_time: int = 1) -> Results:
    """Make every row that is not there, and return all of them.

    Args:
        plan: what is asked for.
        folder: of everything that is written.
        console: where each row is told.
        at_a_time: rows that are made at once.
    """
    results, rows, begun = Results(plan), Rows(folder / ROWS), perf_counter()
    wanted, missing = jobs(plan), list[Job]()
    for job in wanted:
        row = rows.find(job)
        if row is None:
            missing.append(job)
        else:
            results.rows[job.arm, job.seed] = row
    there = len(wanted) - len(missing)
    console.print(f"{len(wanted)} rows" + (f"; {there} are there." if there else "."), highlight=False)
    pool = Pool(rows, folder / RUNS, jobs=at_a_time, worker=WORKER)
    for job, result in pool.run(missing, lambda job, row: ()):
        if isinstance(result, Failed):
            results.failed[job.arm, job.seed] = result.why
        else:
            results.rows[job.arm, job.seed] = result
        _tell(console, job, result)
    results.seconds = perf_counter() - begun
    return results


def _tell(console: Console, job: Job, result: Result) -> None:
    name = f"{job.arm} seed {job.seed}"
    if isinstance(result, Failed):
        console.print(Text(f"{name} failed: {result.why} (all it said: {result.log})", style="red"))
    else:
        console.print(Text(f"{name}: made in {duration(result['process_seconds'])}"))
