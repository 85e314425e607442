"""What the gauntlet found, as plain records: they leave the sandbox as JSON, and need no torch to be read."""

from typing import Literal

from pydantic import Field

from esper.leyline.artifacts import Pipeline
from esper.leyline.base import Record
from esper.leyline.events import Rejection
from esper.leyline.reports import HardwareContext

Kind = Literal["normal", "zeros", "nan", "inf", "extreme"]
"""Random normal numbers; zeros; normal numbers with one sample of NaN, of infinities, or of 1e30."""


class Recipe(Record):
    """An input that anybody can make again with `esper.urabrask.inputs.make`.

    Args:
        shape: sizes of the axes.
        dtype: precision, e.g. `float32`.
        seed: seed of the generator.
        scale: standard deviation of the numbers.
        kind: what is special about them.
        spoiled: index of the sample that is special; -1 for none.
        call: how many calls with other inputs came before this one in the same check.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    seed: int = 0
    scale: float = 1.0
    kind: Kind = "normal"
    spoiled: int = -1
    call: int = 0


class Failure(Record):
    """A check that a kernel did not pass.

    Args:
        check: name of the check.
        detail: what happened, in one sentence.
        recipe: the input; None when it happened without one.
        rejection: what this means for the kernel.
    """

    check: str
    detail: str
    recipe: Recipe | None = None
    rejection: Rejection = Rejection.SANITY_FAILED

    def __str__(self) -> str:
        """Return check, detail and input in one line."""
        given = f"; input: {self.recipe.model_dump_json()}" if self.recipe is not None else ""
        return f"{self.check}: {self.detail}{given}"


class Measured(Record):
    """What the benchmark measured; times are those of a processor that does nothing else.

    Args:
        batch: samples per call.
        calls: timed calls of the kernel, and as many of its eager module.
        forward_ms: mean time of a forward, in milliseconds.
        forward_ms_p99: 99th percentile of it.
        step_ms: median time of forward and backward, in milliseconds.
        eager_forward_ms: mean time of the eager module's forward, in milliseconds.
        eager_step_ms: median time of the eager module's forward and backward, in milliseconds.
        step_ratio: median over the runs of `step_ms / eager_step_ms`; below 1 is faster.
        ratio_spread: largest less smallest ratio of the runs, relative to their median.
        latency_spread: the same for the forward's median time.
        memory_mb: memory that forward and backward hold at their peak beside parameters and input, in MiB.
        eager_memory_mb: the same for the eager module.
        power_watts: mean power of the whole processor during the measurement, in watts; None where it cannot be read.
        drift: largest relative difference from a float64 reference, of result and gradients.
        eager_drift: the same for the eager module.
    """

    batch: int = Field(ge=1)
    calls: int = Field(ge=1)
    forward_ms: float = Field(ge=0.0)
    forward_ms_p99: float = Field(ge=0.0)
    step_ms: float = Field(ge=0.0)
    eager_forward_ms: float = Field(ge=0.0)
    eager_step_ms: float = Field(gt=0.0)
    step_ratio: float = Field(ge=0.0)
    ratio_spread: float = Field(ge=0.0)
    latency_spread: float = Field(ge=0.0)
    memory_mb: float = Field(ge=0.0)
    eager_memory_mb: float = Field(ge=0.0)
    power_watts: float | None = Field(default=None, ge=0.0)
    drift: float = Field(ge=0.0)
    eager_drift: float = Field(ge=0.0)

    @property
    def spread(self) -> float:
        """The larger of both spreads."""
        return max(self.ratio_spread, self.latency_spread)


class Findings(Record):
    """Everything that the gauntlet found about one kernel.

    Args:
        kernel_id: the kernel.
        pipeline: how it was compiled.
        checks: names of the checks that it went through.
        failures: those that it did not pass.
        margin: largest difference from the eager module, as a share of what is tolerated.
        nodes: operations of its blueprint.
        library_mb: size of its native code, in MiB; 0 for an eager kernel.
        measured: the benchmark; None when a check failed before it.
        hardware: where it ran.
    """

    kernel_id: str
    pipeline: Pipeline
    checks: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()
    margin: float = Field(default=0.0, ge=0.0)
    nodes: int = Field(default=0, ge=0)
    library_mb: float = Field(default=0.0, ge=0.0)
    measured: Measured | None = None
    hardware: HardwareContext
