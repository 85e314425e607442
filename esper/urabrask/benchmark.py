"""Stage 2 of the gauntlet: what does the kernel cost, and what does its eager module cost beside it?

Times are processor time of the one thread that computes: what a call takes on a processor that does nothing else. On a
crowded machine the clock on the wall measures the crowd. Kernel and eager module take turns in one process; the same
measurement is made several times, and the spread over these runs is part of the result.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from esper.blueprints.build import Child
from esper.urabrask.findings import Measured
from esper.urabrask.inputs import Subject, make, step
from esper.urabrask.limits import STEADY

BATCH: Final = 8
"""Samples per call: the batch for which kernels are tuned."""

RUNS: Final = 5
"""Identical runs of one measurement."""


_RUN_S: Final = 0.5
_CALLS: Final = (16, 400)
_EXTENSIONS: Final = 2
_WARM_UP: Final = 5
_MEBIBYTE: Final = 2**20
_POWERCAP: Final = Path("/sys/class/powercap")


class _Sample(NamedTuple):
    """Times of one call, in seconds: its forward, and forward and backward together."""

    forward: float
    step: float


class _Run(NamedTuple):
    """The calls of one run, the two modules in turns."""

    kernel: list[_Sample]
    eager: list[_Sample]

    @property
    def ratio(self) -> float:
        """Median step of the kernel relative to the eager module's."""
        return median(s.step for s in self.kernel) / median(s.step for s in self.eager)

    @property
    def latency(self) -> float:
        """Median forward of the kernel, in seconds."""
        return median(s.forward for s in self.kernel)


def benchmark(subject: Subject) -> Measured:
    """Measure a kernel beside its eager module."""
    recipe = subject.recipe(BATCH, seed=501)
    x = make(recipe)
    gradient = torch.ones_like(subject.eager(x)) / x.numel()
    meter = Power.find()
    runs, watts = _powered(meter, lambda: _steady_runs(subject, x, gradient))
    kernel, eager = ([s for run in runs for s in getattr(run, who)] for who in ("kernel", "eager"))
    forwards = sorted(1e3 * s.forward for s in kernel)
    exact = step(subject.exact, x.double(), gradient.double())
    return Measured(
        batch=BATCH,
        calls=len(kernel),
        forward_ms=mean(forwards),
        forward_ms_p99=forwards[min(len(forwards) - 1, int(0.99 * len(forwards)))],
        step_ms=1e3 * median(s.step for s in kernel),
        eager_forward_ms=1e3 * mean(s.forward for s in eager),
        eager_step_ms=1e3 * median(s.step for s in eager),
        step_ratio=median(run.ratio for run in runs),
        ratio_spread=spread([run.ratio for run in runs]),
        latency_spread=spread([run.latency for run in runs]),
        memory_mb=peak_memory_mb(lambda: step(subject.child, x, gradient)),
        eager_memory_mb=peak_memory_mb(lambda: step(subject.eager, x, gradient)),
        power_watts=watts,
        drift=_drift(step(subject.child, x, gradient), exact),
        eager_drift=_drift(step(subject.eager, x, gradient), exact),
    )


def spread(values: list[float]) -> float:
    """Return the largest less the smallest, relative to the median.

    Example:
        >>> round(spread([1.0, 1.02, 0.99]), 6)
        0.03
    """
    return (max(values) - min(values)) / median(values)


def peak_memory_mb(run: Callable[[], object]) -> float:
    """Return the most memory that torch holds at once during a call, less what it held before, in MiB.

    Example:
        >>> peak_memory_mb(lambda: torch.zeros(2**18))
        1.0
    """
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / _MEBIBYTE


class Power(NamedTuple):
    """A counter of the energy that the processor takes, where the system shows one; calling it returns joules.

    Args:
        counter: file with the energy since the counter's last turn, in microjoules.
    """

    counter: Path

    @classmethod
    def find(cls, root: Path = _POWERCAP) -> "Power | None":
        """Return the counter of the first processor; None where there is none, or it may not be read."""
        for counter in sorted(root.glob("intel-rapl:*/energy_uj")):
            meter = cls(counter)
            try:
                meter()
            except (OSError, ValueError):
                continue
            return meter
        return None

    def __call__(self) -> float:
        """Return the energy, in joules."""
        return int(self.counter.read_text()) / 1e6


def _powered(meter: Power | None, run: Callable[[], list[_Run]]) -> tuple[list[_Run], float | None]:
    """Measure, and return the mean power meanwhile; None without a counter, or where it began anew in between."""
    if meter is None:
        return run(), None
    started, before = time.monotonic(), meter()
    runs = run()
    joules, seconds = meter() - before, time.monotonic() - started
    return runs, joules / seconds if joules >= 0.0 else None


def _steady_runs(subject: Subject, x: Tensor, gradient: Tensor) -> list[_Run]:
    """Measure; while the runs differ too much, measure again with longer ones."""
    for _ in range(_WARM_UP):
        _sample(subject.child, x, gradient)
        _sample(subject.eager, x, gradient)
    pair = _sample(subject.child, x, gradient).step + _sample(subject.eager, x, gradient).step
    calls = min(_CALLS[1], max(_CALLS[0], int(_RUN_S / pair)))
    for _ in range(_EXTENSIONS + 1):
        runs = [_run(subject, x, gradient, calls) for _ in range(RUNS)]
        # The clock rate of a shared processor moves every time, and both modules alike: longer runs do not help that.
        if spread([run.ratio for run in runs]) <= STEADY:
            break
        calls *= 2
    return runs


def _run(subject: Subject, x: Tensor, gradient: Tensor, calls: int) -> _Run:
    run = _Run([], [])
    turns = ((subject.child, run.kernel), (subject.eager, run.eager))
    for call in range(calls):
        for child, samples in turns if call % 2 else turns[::-1]:
            samples.append(_sample(child, x, gradient))
    return run


def _sample(child: Child, x: Tensor, gradient: Tensor) -> _Sample:
    x = x.detach().requires_grad_()
    wanted = [x, *(p for p in child.parameters() if p.requires_grad)]
    began = time.thread_time_ns()
    result = child(x)
    between = time.thread_time_ns()
    torch.autograd.grad(result, wanted, gradient, allow_unused=True)
    ended = time.thread_time_ns()
    return _Sample((between - began) / 1e9, (ended - began) / 1e9)


def _drift(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a tensor from its exact twin, relative to the largest number in the latter."""
    largest = max(float(true.abs().max()) for true in exact.values())
    differences = (
        float((found[name].double() - true).abs().max()) / max(float(true.abs().max()), 1e-6 * largest, 1e-30)
        for name, true in exact.items()
    )
    return max(differences)
