"""Does the forge disturb training? A run on one core, a real forge on another, in windows of a second and a half.

In turns the forge's workers work ("busy"), stand still ("idle"), or stand still while a plain Python program that has
nothing to do with Esper compiles source text on their core ("program": what sharing the machine costs). All three are
windows of the same run, so that what else the machine does hits them alike; the processes are stopped and continued by
signals. A step counts for the window in which it begins and ends.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from esper.bench.pool import LOG
from esper.bench.rows import JOB_FILE, write
from esper.bench.speed.forge import connected
from esper.bench.speed.kernels import p99, spec
from esper.bench.speed.line import Line, not_measured
from esper.bench.speed.training import STEPS_FILE, config
from esper.blueprints import STANDARD
from esper.forge.client import Forge
from esper.forge.link import REQUESTED
from esper.leyline.artifacts import CompilationRequest
from esper.leyline.errors import KernelError

P99: Final = 1.05
AT_A_GRAFT: Final = 2.0
HIT_RATE: Final = 99.5

KINDS: Final = ("busy", "idle", "program")
_WINDOW_S, _GUARD_S, _LOOK_S = 1.5, 0.1, 0.05
_WARM_UP, _AROUND = 50, 10
_LEAST_STEPS, _BUSY = 100, 0.5
_PROGRAM: Final = """
import pathlib, sysconfig
texts = [p.read_bytes() for p in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))]
while True:
    for text in texts:
        compile(text, "text", "exec")
"""
_BEGUN: Final = ("GERMINATED", "GRAFTING")


class Window(NamedTuple):
    """A stretch of time on the monotonic clock in which one thing ran beside the training."""

    kind: str
    began: float
    ended: float


class Run(NamedTuple):
    """What a run showed.

    Args:
        began: when each step began, in seconds.
        times: seconds that it took.
        lookups: after each step, how many lookups of a kernel found it in memory, and how many there were.
        moments: steps right after a graft.
        known: step from which on every kind had been grafted before.
        windows: what ran beside it.
        pools_s: processor time of the forge's workers in its windows, in seconds.
    """

    began: list[float]
    times: list[float]
    lookups: list[tuple[int, int]]
    moments: list[int]
    known: int
    windows: list[Window]
    pools_s: float


# --- what the numbers say -------------------------------------------------------------------------------------------


def by_kind(run: Run) -> dict[str, list[float]]:
    """Return the times of the steps that lie wholly in windows of each kind, those of the first steps left out."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for began, taken in zip(run.began[_WARM_UP:], run.times[_WARM_UP:], strict=True):
        for window in run.windows:
            if window.began <= began and began + taken <= window.ended:
                found[window.kind].append(taken)
    return found


def stall_lines(run: Run) -> list[Line]:
    """Return how much longer the longest steps are beside busy pools, and the step at a graft."""
    return [_p99_line(run), _graft_line(run)]


def _p99_line(run: Run) -> Line:
    what, found = "p99 of a step, pools busy over idle", by_kind(run)
    fewest = min(map(len, found.values()))
    if fewest < _LEAST_STEPS:
        return not_measured(what, "x", P99, f"only {fewest} steps fell into one kind of window; give more --steps")
    if (share := busy_share(run)) < _BUSY:
        return not_measured(what, "x", P99, f"the pools got {100 * share:.0f} % of their core only; others work here")
    ends = {kind: p99(times) for kind, times in found.items()}
    medians = {kind: 1e3 * statistics.median(times) for kind, times in found.items()}
    return Line(
        what=what,
        value=ends["busy"] / ends["idle"],
        unit="x",
        target=P99,
        limit=ends["program"] / ends["idle"],
        of="a plain Python program beside it",
        numbers={
            "p99_ms": ends,
            "median_ms": medians,
            "steps": {kind: len(times) for kind, times in found.items()},
            "pools_cpu_s": run.pools_s,
            "pools_share": share,
        },
    )


def busy_share(run: Run) -> float:
    """Return how much of their core the forge's workers had in the windows that were theirs, 0 to 1."""
    return run.pools_s / sum(window.ended - window.began for window in run.windows if window.kind == "busy")


def _graft_line(run: Run) -> Line:
    moments = [step for step in run.moments if _WARM_UP <= step < len(run.times)]
    what = "longest step at a graft over its neighbours"
    if not moments:
        return not_measured(what, "x", AT_A_GRAFT, "nothing was grafted; give more --steps")
    ratios = [_over_neighbours(run.times, step) for step in moments]
    # As far from one graft as from the next.
    others = [_over_neighbours(run.times, step - _AROUND) for step in moments]
    return Line(
        what=f"{what}, {len(ratios)} grafts",
        value=max(ratios),
        unit="x",
        target=AT_A_GRAFT,
        limit=max(others),
        of="as many steps without a graft",
        numbers={"ratios": ratios, "others": others, "median": statistics.median(ratios)},
    )


def _over_neighbours(times: Sequence[float], step: int) -> float:
    around = [*times[max(0, step - _AROUND) : step], *times[step + 1 : step + 1 + _AROUND]]
    return times[step] / statistics.median(around)


def hit_line(run: Run) -> Line:
    """Return how many lookups of a kernel found it in memory, once each kind had been grafted."""
    what = "lookups that found their kernel, once each kind had been grafted"
    first = min(run.known, len(run.lookups) - 1)
    found, lookups = (last - then for last, then in zip(run.lookups[-1], run.lookups[first], strict=True))
    if not lookups:
        return not_measured(what, "%", HIT_RATE, "too few grafts; give more --steps")
    return Line(
        what=what,
        value=100 * found / lookups,
        unit="%",
        target=HIT_RATE,
        at_least=True,
        limit=100.0,
        of="a dict of all kernels",
        numbers={"found": found, "lookups": lookups, "all": list(run.lookups[-1])},
    )


# --- the run --------------------------------------------------------------------------------------------------------


def why_not() -> str:
    """Return why a run and a forge cannot be kept apart here; empty where they can."""
    if not hasattr(os, "sched_setaffinity"):
        return "this system cannot keep a process on a core"
    return "" if len(os.sched_getaffinity(0)) > 1 else "there is one core only"


def train(folder: Path, steps: int) -> Run:
    """Train beside a forge of its own.

    Args:
        folder: scratch folder.
        steps: training steps.

    Raises:
        KernelError: the forge does not start, or the run fails.
    """
    cores = sorted(os.sched_getaffinity(0))
    root = folder / "forge"
    write(folder / JOB_FILE, config(folder, root, steps))
    with Forge(enabled=True, root=str(root), adopt="any") as forge:
        with _on({cores[-1]}):
            bus = connected(forge)
        with bus:
            for kind in STANDARD:
                bus.publish(CompilationRequest(spec=spec(kind), pipeline="standard", requester="speed"), REQUESTED)
        card = forge.running()
        if card is None:
            raise KernelError("the forge has ended.")
        with _process([sys.executable, "-c", _PROGRAM], {cores[-1]}, folder / "program.txt") as program:
            command = [sys.executable, "-m", "esper.bench.speed.training", str(folder)]
            with _process(command, {cores[0]}, folder / LOG) as training, _on({cores[-1]}):
                windows, spent = _in_turns(training, psutil.Process(card["pid"]), psutil.Process(program.pid))
    return _told(folder, training.returncode, windows, spent)


def _told(folder: Path, status: int, windows: list[Window], spent: float) -> Run:
    if status != 0 or not (folder / STEPS_FILE).is_file():
        said = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise KernelError(f"the training ended with status {status}: {said[-1] if said else 'it said nothing'}")
    told = json.loads((folder / STEPS_FILE).read_text(encoding="utf-8"))
    journal = next((folder / "run").rglob("events.jsonl")).read_text(encoding="utf-8")
    events = [json.loads(line) for line in journal.splitlines()]
    moments = sorted({event["step"] for event in events if event.get("target") in _BEGUN})
    first = {event["blueprint_id"]: event["step"] for event in reversed(events) if event.get("target") == "GRAFTING"}
    lookups = [(found, count) for found, count in told["lookups"]]
    return Run(told["began"], told["times"], lookups, moments, max(first.values(), default=0), windows, spent)


def _in_turns(
    training: "subprocess.Popen[bytes]", forge: psutil.Process, program: psutil.Process
) -> tuple[list[Window], float]:
    """Let the forge's workers and the program work in turns until the training ends; return windows and CPU time."""
    windows: list[Window] = []
    spent = 0.0
    try:
        for kind in cycle(KINDS):
            _let(forge.children(recursive=True), kind == "busy")
            _let([program], kind == "program")
            began, before = time.monotonic() + _GUARD_S, _cpu(forge)
            while time.monotonic() < began + _WINDOW_S and training.poll() is None:
                time.sleep(_LOOK_S)
            windows.append(Window(kind, began, time.monotonic()))
            if kind == "busy":
                spent += max(0.0, _cpu(forge) - before)
            if training.poll() is not None:
                return windows, spent
    finally:
        with suppress(psutil.Error):
            _let(forge.children(recursive=True), True)
    raise AssertionError("windows never end by themselves")


def _let(processes: Sequence[psutil.Process], work: bool) -> None:
    for process in processes:
        with suppress(psutil.Error, ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT if work else signal.SIGSTOP)


def _cpu(forge: psutil.Process) -> float:
    """Return the processor time of the forge's workers and of what they have started and ended, in seconds."""
    spent = 0.0
    for process in forge.children(recursive=True):
        with suppress(psutil.Error):
            used = process.cpu_times()
            spent += used.user + used.system + used.children_user + used.children_system
    return spent


@contextmanager
def _process(command: list[str], cores: set[int], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a process on some cores, and leave none behind."""
    with log.open("wb") as out, _on(cores):
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            process_group=0,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """Let what is started meanwhile run on some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
