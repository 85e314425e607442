"""The rows of the table: what each measures, and how often."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

from esper.bench.speed import attach, compiling, decision, dormant, graft, kernels, stalls
from esper.bench.speed.hosts import image_model, language_model
from esper.bench.speed.line import Line, not_measured

STEPS: Final = 2400
QUICK_STEPS: Final = 900

_HOSTS: Final = (language_model, image_model)


@dataclass(frozen=True)
class Effort:
    """How much is done.

    Args:
        scratch: folder that is gone afterwards.
        quick: fewer repeats.
        compile: whether kernels are compiled.
        steps: training steps in which stalls are looked for; None takes 2,400, with `quick` 900.
    """

    scratch: Path
    quick: bool = False
    compile: bool = False
    steps: int | None = None

    def times(self, usual: int, quick: int) -> int:
        """Return how often something is repeated."""
        return quick if self.quick else usual

    @cached_property
    def training(self) -> stalls.Run:
        """The run in which stalls and lookups are looked for."""
        steps = self.steps or self.times(STEPS, QUICK_STEPS)
        folder = self.scratch / "training"
        folder.mkdir(parents=True)
        return stalls.train(folder, steps)


class Row(NamedTuple):
    """A row of the table, of one or more lines.

    Args:
        about: what it measures, in a line.
        measure: returns its lines.
    """

    about: str
    measure: Callable[[Effort], list[Line]]


def _stalls(effort: Effort) -> list[Line]:
    if why := stalls.why_not():
        return [
            not_measured("p99 of a step, pools busy over idle", "x", stalls.P99, why),
            not_measured("longest step at a graft over its neighbours", "x", stalls.AT_A_GRAFT, why),
        ]
    return stalls.stall_lines(effort.training)


def _cache(effort: Effort) -> list[Line]:
    if why := stalls.why_not():
        return [not_measured("lookups that found their kernel", "%", stalls.HIT_RATE, why)]
    return [stalls.hit_line(effort.training)]


def _dormant(effort: Effort) -> list[Line]:
    return [dormant.overhead_line(make(), effort.times(9, 3), repeats=2) for make in _HOSTS]


def _memory(effort: Effort) -> list[Line]:
    return [dormant.memory_line(make()) for make in _HOSTS]


def _kernel(effort: Effort) -> list[Line]:
    times = effort.times(300, 100)
    return [kernels.hit_line(200 * times), *kernels.eager_lines(times)]


def _graft(effort: Effort) -> list[Line]:
    host = partial(language_model, d_model=64, layers=3, samples=4, length=128)
    return graft.lines(host, effort.times(9, 3))


def _decision(effort: Effort) -> list[Line]:
    return decision.decision_lines(effort.times(5, 2))


def _telemetry(effort: Effort) -> list[Line]:
    return decision.telemetry_lines((*_HOSTS, decision.many_seeds), effort.times(30, 10))


def _attach(effort: Effort) -> list[Line]:
    return attach.lines(attach.large, effort.times(15, 3))


def _compile(effort: Effort) -> list[Line]:
    if not effort.compile:
        return compiling.left_out()
    return compiling.lines(effort.scratch / "compile", effort.times(200, 50))


ROWS: Final[Mapping[str, Row]] = MappingProxyType(
    {
        "dormant": Row("what dormant seeds add to a training step", _dormant),
        "memory": Row("what memory dormant seeds take", _memory),
        "kernel": Row("a lookup, a load, and a verification of a kernel", _kernel),
        "graft": Row("the first step with a child, and recompiles of the host", _graft),
        "decision": Row("Tamiyo's turn at a boundary, with 10,000 seeds", _decision),
        "telemetry": Row("from a boundary to the state that Tamiyo reads", _telemetry),
        "attach": Row("attaching to a large transformer, beside PEFT", _attach),
        "stalls": Row("training beside busy and idle pools, and at grafts", _stalls),
        "cache": Row("lookups of kernels that found them in memory", _cache),
        "compile": Row("compiling a kernel, and loading a compiled one", _compile),
    }
)
"""Every row, in the order in which they are measured."""
