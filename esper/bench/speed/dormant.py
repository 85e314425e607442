"""What dormant seeds cost: time of a step, and memory.

The seeds of one and the same model are taken off and put back between two steps, because two copies of a model differ
by percents through their place in memory alone. "The bare model again" is the noise floor. The seeds have default
targets and default telemetry; a step is forward and backward. Processor time of one thread, in blocks, in each of which
everything runs interleaved, there and back; the least of the runs in a block counts.

Dormant seeds touch no tensor in the steps that are not sampled: what they cost is time in Python, the same for any
input. It is therefore measured where arithmetic is least, as the difference of a step with seeds and a bare one on the
smallest input of the model, because no machine that others use repeats a whole step to a part in a thousand. The
overhead is the median over the blocks of `((n - 1) * small_difference + (sampled - bare)) / n / bare`, one step in `n`
being sampled. One sampled step in 8 is read fully, which costs more: both kinds are timed, and `sampled` is their mean
at these shares.
"""

import gc
import statistics
import tracemalloc
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch

from esper.bench.speed.hosts import Subject, seeded
from esper.bench.speed.line import Line
from esper.bench.speed.timing import Median, blocks
from esper.kasmina.layer import FULLY_EVERY
from esper.kasmina.steps import SeedStepper
from esper.kasmina.wrapper import MorphableModel

BUDGET: Final = 1.01
"""Most that a step with dormant seeds may take of a bare one."""

MEMORY: Final = 5.0
"""Most memory of dormant seeds, in percent of the host's parameters."""

_MIB: Final = 2**20


class Overhead(NamedTuple):
    """One model: ratios to its bare self, and what a step of that takes in milliseconds."""

    name: str
    sites: int
    bare_ms: float
    control: Median
    small: Median
    sampled: Median
    plain: Median
    overhead: Median

    @property
    def met(self) -> bool:
        """Whether the median is within the budget."""
        return self.overhead.value <= BUDGET


class Seeds:
    """The seeds of a model, which can be taken off it and put back in microseconds.

    Args:
        subject: the model that was wrapped.
        model: the same, with its seeds, probed as by the first epoch of a run.
    """

    def __init__(self, subject: Subject, model: MorphableModel) -> None:
        """Remember the hooks of every site."""
        self.loss, self.model, self.stepper = subject.loss, model, SeedStepper(model.bank)
        self.sites = [layer.site for layer in model.bank.all_layers()]
        self.hooks = [(site._forward_hooks.copy(), site._forward_hooks_with_kwargs.copy()) for site in self.sites]

    def step(self, batch: Any, *, at: int | None) -> Callable[[], None]:
        """Return a step of the bare host, or with seeds one as the callback makes it at a step of the run."""

        def bare() -> None:
            self.model.host.zero_grad()
            self.loss(self.model.host, batch).backward()  # type: ignore[no-untyped-call]

        def with_seeds() -> None:
            assert at is not None
            self.stepper.begin(at)
            bare()
            self.stepper.observe_gradients()
            self.stepper.begin(at + 1)

        return bare if at is None else with_seeds

    def read(self, fully: bool) -> None:
        """Let the next sampled step be a full reading, as the first after a boundary is, or not."""
        for layer in self.model.bank.all_layers():
            layer.samples[:] = 0 if fully else 1

    def put(self, on: bool) -> None:
        """Take the seeds off, or put them back."""
        for site, (hooks, with_kwargs) in zip(self.sites, self.hooks, strict=True):
            site._forward_hooks.clear()
            site._forward_hooks_with_kwargs.clear()
            if on:
                site._forward_hooks.update(hooks)
                site._forward_hooks_with_kwargs.update(with_kwargs)


def overhead(subject: Subject, count: int, repeats: int = 3) -> Overhead:
    """Time one model in so many blocks."""
    seeds = Seeds(subject, seeded(subject))
    calls = {
        "bare": seeds.step(subject.batch, at=None),
        "control": seeds.step(subject.batch, at=None),
        "unsampled": seeds.step(subject.batch, at=1),
        "sampled": seeds.step(subject.batch, at=0),
        "sampled fully": seeds.step(subject.batch, at=0),
        "bare small": seeds.step(subject.small, at=None),
        "unsampled small": seeds.step(subject.small, at=1),
    }

    def prepare(call: str) -> None:
        seeds.put("sampled" in call)
        seeds.read("fully" in call)

    blocks(calls, 1, prepare=prepare)
    found = blocks(calls, count, repeats=repeats, prepare=prepare)
    for times in found:
        times["sampled"] += (times.pop("sampled fully") - times["sampled"]) / FULLY_EVERY
    return _summary(subject.name, len(seeds.sites), seeds.model.bank.config.telemetry_every, found)


def _summary(name: str, sites: int, every: int, found: list[dict[str, float]]) -> Overhead:
    """Turn the seconds of the blocks into ratios to a bare step, 1 where nothing is added."""
    rest, extra = every - 1, [times["unsampled small"] - times["bare small"] for times in found]
    pairs = list(zip(found, extra, strict=True))
    return Overhead(
        name,
        sites,
        bare_ms=1e3 * statistics.median(times["bare"] for times in found),
        control=Median.of([t["control"] / t["bare"] for t in found]),
        small=Median.of([1 + more / t["bare"] for t, more in pairs]),
        sampled=Median.of([t["sampled"] / t["bare"] for t in found]),
        plain=Median.of([(rest * t["unsampled"] + t["sampled"]) / every / t["bare"] for t in found]),
        overhead=Median.of([1 + (rest * more + t["sampled"] - t["bare"]) / every / t["bare"] for t, more in pairs]),
    )


def overhead_line(subject: Subject, count: int, repeats: int = 3) -> Line:
    """Return what a step with dormant seeds takes beyond a bare one, in percent."""
    found = overhead(subject, count, repeats)
    ratios = {name: value._asdict() for name, value in found._asdict().items() if isinstance(value, Median)}
    return Line(
        what=f"dormant seeds, {found.sites} sites, of a step of {_named(subject)} in {found.bare_ms:.0f} ms",
        value=_percent(found.overhead),
        unit="%",
        target=_percent(Median(BUDGET, BUDGET, BUDGET)),
        limit=_percent(found.control),
        of="the bare model again",
        numbers={"bare_ms": found.bare_ms, "sites": found.sites, "blocks": count, "ratios": ratios},
    )


def _percent(ratio: Median) -> float:
    return round(100 * (ratio.value - 1), 6)


def _named(subject: Subject) -> str:
    return f"{subject.name} ({sum(p.numel() for p in subject.model.parameters()) / 1e6:.1f} M)"


# --- memory ---------------------------------------------------------------------------------------------------------


def memory_line(subject: Subject) -> Line:
    """Return the memory of a model's dormant seeds, Python's objects included, in percent of its parameters.

    Counted are the tensors that are alive with the seeds after a sampled step and were not before, and what Python has
    allocated for them; both are steps of the same model.
    """
    host = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    _step(subject)
    before = _storages()
    tracemalloc.start()
    try:
        model = seeded(subject)
        stepper = SeedStepper(model.bank)
        stepper.begin(0)
        _step(subject)
        stepper.begin(1)
        gc.collect()
        python = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    tensors = sum(size for key, size in _storages().items() if key not in before)
    return Line(
        what=f"memory of dormant seeds, of the parameters of {_named(subject)}",
        value=100 * (tensors + python) / host,
        unit="%",
        target=MEMORY,
        limit=0.0,
        of=f"no seeds; the parameters take {host / _MIB:.0f} MiB",
        numbers={"tensor_bytes": tensors, "python_bytes": python, "host_bytes": host, "seeds": len(model.bank.rows)},
    )


def _step(subject: Subject) -> None:
    subject.loss(subject.model, subject.batch).backward()  # type: ignore[no-untyped-call]
    subject.model.zero_grad()


def _storages() -> dict[int, int]:
    """Return the size of every tensor's memory by its address."""
    gc.collect()
    # `isinstance` would ask lazy modules for their class, which imports them.
    tensors = (item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and item.device.type == "cpu")
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
