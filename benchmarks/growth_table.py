"""The table of the growth benchmark: means, paired differences, and what they say in words."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from growth_tasks import STATIC, TASKS, Task
from scipy.stats import t as student

Row = dict[str, Any]
LOSS, ACCURACY = "report_loss", "report_accuracy"


class Estimate(NamedTuple):
    """A mean over seeds and its 95 % interval by Student's t; without an interval where there is one seed.

    Args:
        mean: the mean.
        half: half the width of the interval, not a number for one seed.
        n: seeds.
        wins: values above 0.
    """

    mean: float
    half: float
    n: int
    wins: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Estimate the mean of some values.

        Example:
            >>> Estimate.of([1.0, 2.0, 3.0]).half
            2.484...
        """
        n = len(values)
        half = float(student.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
        return cls(fmean(values), half, n, sum(value > 0 for value in values))

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half

    def told(self, sign: str = "", digits: int = 3) -> str:
        """Return it as text."""
        mean = f"{self.mean:{sign}.{digits}f}"
        return mean if self.n < 2 else f"{mean} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


def group(rows: Sequence[Row], task: str, arm: str) -> list[Row]:
    """Return the rows of an arm, by seed."""
    return sorted((r for r in rows if (r["task"], r["arm"]) == (task, arm)), key=lambda row: row["seed"])


def paired(rows: Sequence[Row], task: str, arm: str, what: str = LOSS) -> Estimate | None:
    """Return what an arm gains on `wide` over the seeds that both have; positive is better."""
    wide = {row["seed"]: row[what] for row in group(rows, task, "wide")}
    sign = 1 if what == LOSS else -1
    gains = [sign * (wide[row["seed"]] - row[what]) for row in group(rows, task, arm) if row["seed"] in wide]
    return Estimate.of(gains) if gains else None


def head() -> tuple[str, ...]:
    """Return the names of the columns."""
    return (
        "task",
        "arm",
        "report loss, nats",
        "accuracy, %",
        "gain on wide, nats",
        "wins",
        "gain on wide, points",
        "parameters",
        "compute",
        "search",
        "steps",
        "kept",
        "first trials",
    )


def summary(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return one line per task and arm."""
    pairs = [(task, arm) for task in TASKS.values() for arm in task.arms]
    return [_line(rows, task, arm) for task, arm in pairs if group(rows, task.name, arm)]


def _line(rows: Sequence[Row], task: Task, arm: str) -> tuple[str, ...]:
    found = group(rows, task.name, arm)
    gain = paired(rows, task.name, arm) if arm != "wide" else None
    points = paired(rows, task.name, arm, ACCURACY) if arm != "wide" and classifies(found) else None
    return (
        task.name,
        _named(task, arm),
        Estimate.of([row[LOSS] for row in found]).told(),
        _percent(Estimate.of([row[ACCURACY] for row in found])).told(digits=1) if classifies(found) else "",
        gain.told("+") if gain else "",
        f"{gain.wins} of {gain.n}" if gain else "",
        _percent(points).told("+", 1) if points else "",
        f"{fmean(row['params'] for row in found):,.0f}",
        f"{fmean(row['compute'] for row in found):.3f}",
        f"{fmean(row['overhead'] for row in found):.1%}" if arm.startswith("live") else "",
        f"{fmean(row['steps'] for row in found):,.0f}",
        kept(found),
        task.expected.get(arm, ""),
    )


def classifies(rows: Sequence[Row]) -> bool:
    """Return whether the rows have an accuracy."""
    return all(row[ACCURACY] is not None for row in rows)


def _percent(found: Estimate) -> Estimate:
    return found._replace(mean=100 * found.mean, half=100 * found.half)


def _named(task: Task, arm: str) -> str:
    kind = task.schedules.get(arm)
    return f"{arm} ({kind.removeprefix('BP-')})" if kind else arm


def kept(rows: Sequence[Row]) -> str:
    """Return which kinds were kept, and in how many of the runs."""
    runs = Counter(kind for row in rows for kind in set(row["kept"]))
    return ", ".join(f"{kind.removeprefix('BP-')} {count}" for kind, count in runs.most_common())


# --- words ----------------------------------------------------------------------------------------------------------


def sentences(rows: Sequence[Row]) -> list[str]:
    """Return what the numbers of each task say, and how often the trial picked a kind that is known to be good."""
    tasks = [task for task in TASKS.values() if any(row["task"] == task.name for row in rows)]
    found = [said for task in tasks for said in (verdict(rows, task), picked(rows, task))]
    return [said for said in found if said]


def verdict(rows: Sequence[Row], task: Task) -> str:
    """Return in one sentence whether growth paid: whether the interval of `live`'s paired gain leaves out 0."""
    gain = paired(rows, task.name, "live")
    if gain is None:
        return ""
    if gain.n < 2:
        return (
            f"{task.name}, {task.title}: cannot be told from one seed; there `live` gains {gain.mean:+.3f} on `wide`."
        )
    word = "growth paid" if gain.low > 0 else "growth did not pay" if gain.high < 0 else "cannot be told"
    why = f"`live` gains {gain.told('+')} nats on `wide`, and is better on {gain.wins} of {gain.n} seeds"
    others = [_beside(rows, task, *pair) for pair in _besides(task)]
    return f"{task.name}, {task.title}: {word}: " + "; ".join([why, *(o for o in others if o)]) + "."


def _besides(task: Task) -> tuple[tuple[str, str], ...]:
    best, fixed = task.arm("schedule_best"), task.arm("schedule_fixed")
    return (
        (best, "the best kind known beforehand"),
        (fixed, "one general kind"),
        ("random", "a kind and place by chance"),
        ("live_no_best", "the trial without the best kind on its menu"),
        ("live_3", "the trial at three growth points"),
        ("live_shadow", "the trial after shadow training"),
    )


def _beside(rows: Sequence[Row], task: Task, arm: str, name: str) -> str:
    gain = paired(rows, task.name, arm)
    return f"{name} {gain.told('+')}" if gain else ""


def picked(rows: Sequence[Row], task: Task) -> str:
    """Return how often the trial's winner was the best kind or the second best; nothing where they are not known."""
    found = group(rows, task.name, "live")
    if not found or not task.ranked:
        return ""
    winners = [next((t["kind"] for t in row["trial"] if t["outcome"] == "FOSSILIZED"), None) for row in found]
    hits = sum(winner in task.ranked for winner in winners)
    known = "best or second-best kind" if len(task.ranked) > 1 else "best kind (no second is known)"
    return f"{task.name}: the trial picked the {known}, {' or '.join(task.ranked)}, in {hits} of {len(found)} runs."


# --- Markdown -------------------------------------------------------------------------------------------------------

TEXT = """# Growth at equal training compute: six tasks

Command: `python benchmarks/growth.py`. Losses are cross-entropies in nats (C and D: per byte) on the report part: the
mean over seeds and its 95 % interval (Student's t). Gains are paired with `wide` seed by seed, positive is better;
`compute` is multiply-accumulates as a fraction of the training of static `wide`: the run's own account, validations
and D's teacher included; `search` is what the search cost, as a fraction of the rest of the training; `kept` says in
how many runs a kind was kept; `first trials` is what the project's first measurements, before the product, gave.

{versions}, one thread a run.

{table}

## What the numbers say

{sentences}

## The tasks

| task | what | `small`, parameters | `wide`, parameters | steps of `wide` | growth from step | trial, steps |
|---|---|---|---|---|---|---|
{tasks}

On A, B, V1 and V2 `wide` is widened where the small net is too narrow, which a user would have to know. The arm
`small` trains longer instead; a scheduled child and one by chance are planted at the step where `live` begins its
trial, and judged once, at the end. A run's length is fixed before it starts: `live` sets aside the compute of one
multiply-accumulate for each parameter of its budget and place, and where it finds something cheaper, or nothing, its
`compute` stays below 1. What `schedule_best` plants on V1 and V2 comes from a first try on
seeds 100 and 101, by the mean loss on the decision part: V1 NEXT .110, SQUEEZE-EXCITE .127, DILATED .151; V2 DILATED
.326 and WIDEN-CONV .326, which is a tie. Kinds well behind on seed 100 were not tried on 101; DEPTHWISE and INVERTED
were not tried. That BP-WIDEN and BP-PROJ-LORA are the best kinds on A comes from seeds 100 to 104 likewise, one
scheduled child each: WIDEN .136, PROJ-LORA .144, MLP-GELU .177, NORM-RMS .184, PROJ-IA3 .185; on C from the project's
first measurements.
{levels}"""

LEVELS = """
## Levels of C and D

The report part is the first twelfth of the library's files, without those in folders named `test` or `tests`; 192 (C)
and 128 (D) windows spread evenly over it are measured. Which windows the first trials took is not recorded, and that
choice alone moves a level, see [windows.md](windows.md). Reading the rule as leaving
out `test` alone, but not `tests`, puts easier files into the report part and lowers all levels of C and D by about .2.
Gains are paired over the same windows and do not depend on that.
"""


def markdown(rows: Sequence[Row]) -> str:
    """Return everything as Markdown."""
    lines = [head(), tuple("---" for _ in head()), *summary(rows)]
    names = {row["task"] for row in rows}
    return TEXT.format(
        versions="; ".join(sorted({row["versions"] for row in rows})),
        table="\n".join(f"| {' | '.join(line)} |" for line in lines),
        sentences="\n".join(f"- {said}" for said in sentences(rows)),
        tasks="\n".join(_task_line(task) for task in TASKS.values() if task.name in names),
        levels=LEVELS if names & {"C", "D"} else "",
    )


def _task_line(task: Task) -> str:
    sizes = [f"{task.parameters(arm):,}" for arm in STATIC]
    numbers = (task.name, task.title, *sizes, f"{task.steps:,}", f"{task.start:,}", str(task.trial))
    return f"| {' | '.join(numbers)} |"
