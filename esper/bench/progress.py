"""What a bench tells while it runs: a bar with the time left, and a line for every row."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from types import TracebackType
from typing import Self, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from esper.bench.pool import Failed, Result
from esper.bench.rows import Job, Row
from esper.nissa.summary import number


def time_left(made: Sequence[Row], todo: Mapping[str, int], jobs: int) -> float | None:
    """Return the seconds that the rows to do will take, by the median of their arm, else of all; None if none is known.

    Args:
        made: rows that were made.
        todo: rows to do, by arm.
        jobs: rows at a time.

    Example:
        >>> made = [{"arm": "off", "process_seconds": 4.0}, {"arm": "heuristic", "process_seconds": 10.0}]
        >>> time_left(made, {"off": 3, "random": 1}, jobs=2)
        9.5
    """
    if not made:
        return None
    everything = median(row["process_seconds"] for row in made)
    total = 0.0
    for arm, count in todo.items():
        own = [row["process_seconds"] for row in made if row["arm"] == arm]
        total += count * (median(own) if own else everything)
    return total / jobs


def duration(seconds: float | None) -> str:
    """Return a time for people.

    Example:
        >>> duration(42), duration(600), duration(9000), duration(None)
        ('42 s', '10 min', '2.5 h', '')
    """
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@final
class BenchProgress:
    """Shows how far a bench is; a file or a pipe gets the lines alone.

    Args:
        console: where to.
        total: rows that are wanted.
        jobs: rows at a time.
        known: rows of earlier runs, from which the first estimate is taken.
    """

    def __init__(self, console: Console, total: int, jobs: int, known: Sequence[Row] = ()) -> None:
        """Show nothing yet."""
        self.console, self.jobs, self.known = console, jobs, list(known)
        columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("rows", total=total, left="")

    def __enter__(self) -> Self:
        """Start the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        self._bar.stop()

    def show(self, done: int, todo: Mapping[str, int]) -> None:
        """Move the bar."""
        left = duration(time_left(self.known, todo, self.jobs))
        self._bar.update(self._task, completed=done, left=f"about {left} left" if left and todo else "")

    def tell(self, job: Job, result: Result) -> None:
        """Say what became of a row."""
        name = f"{job.arm} seed {job.seed}"
        if isinstance(result, Failed):
            self.console.print(Text(f"{name} failed: {result.why} (all it said: {result.log})", style="red"))
            return
        self.known.append(result)
        loss = "diverged" if result["report_loss"] is None else number(result["report_loss"])
        counts: Counter[str] = Counter(result["kept"])
        kinds = [f"{count} {kind}" for kind, count in counts.items()]
        kept = f", kept {', '.join(kinds)}" if kinds else ""
        took = duration(result["process_seconds"])
        self.console.print(Text(f"{name}: report loss {loss}, {result['steps']:,} steps, {took}{kept}"))
