"""What is reported about seeds: their site, price, measured effect, health, and how their life ended."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from esper.leyline.base import Message, Record
from esper.leyline.states import Reason, SeedState

FINAL = frozenset({SeedState.FOSSILIZED, SeedState.CULLED, SeedState.CANCELLED, SeedState.ROLLED_BACK})
"""The states in which a life cycle may end, and with which a `FieldReport` may close it."""

Layout = Literal["btd", "bd", "bchw"]
"""Axes of a site's tensors: batch, time, features; batch, features; or batch, channels, height, width."""


class Counterfactual(Record):
    """The effect of a child, measured on the same samples with the child on and off.

    `mean = E_i[loss_i(without) - loss_i(with)]`: positive means that the child helps.

    Args:
        mean: mean paired difference, in the unit of the task's loss.
        lower: lower bound of the confidence interval, same unit; `-inf` when one sample is all there is.
        upper: upper bound of the confidence interval, same unit.
        n: number of paired samples.
    """

    mean: float
    lower: float
    upper: float
    n: int = Field(ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        """Refuse an interval that ends before it begins; NaN bounds pass, they say 'unknown'."""
        if self.lower > self.upper:
            raise ValueError(f"interval [{self.lower}, {self.upper}] is empty; give the lower bound first")
        return self


class SiteInfo(Record):
    """The place in the host where a seed lives.

    Args:
        module_path: path of the module in the host, as in `named_modules`.
        module_type: class name of the module.
        layout: axes of its tensors.
        width: features that leave the module.
        input_width: features that enter it.
        depth: relative position in the forward pass, 0 for the first site and 1 for the last.
    """

    module_path: str
    module_type: str
    layout: Layout
    width: int = Field(ge=1)
    input_width: int = Field(ge=1)
    depth: float = Field(ge=0.0, le=1.0)


class Cost(Record):
    """What a child costs at its real shape.

    Args:
        params: parameters added.
        flops: floating-point operations of one forward over one sample (for `btd`: one token).
        latency_ms: time added to one forward, in milliseconds; `None` when not measured.
    """

    params: int = Field(default=0, ge=0)
    flops: int = Field(default=0, ge=0)
    latency_ms: float | None = None


class HardwareContext(Message):
    """The device that a number was measured on.

    Args:
        device_type: `cpu`, `cuda`, `mps`, ...
        device_name: what the device calls itself.
        memory_available_gb: free memory, in GiB.
        supports_bf16: whether bfloat16 arithmetic runs on it.
        supports_quantization: whether int8 kernels run on it.
    """

    device_type: str
    device_name: str = ""
    memory_available_gb: float = Field(default=0.0, ge=0.0)
    supports_bf16: bool = False
    supports_quantization: bool = False


class HealthSignal(Message):
    """The health of one seed's chunk at one sample of telemetry.

    Args:
        layer_id: module path of the layer.
        seed_id: full seed id, `layer#chunk.slot`.
        epoch: epoch of the sample, from 0.
        step: optimizer step of the sample, from 0.
        metrics: value by name, e.g. `chunk_variance`, `dead_node_ratio` (0 to 1).
        is_ready_for_transition: whether the seed's present stage has done its work.
    """

    layer_id: str
    seed_id: str
    epoch: int = Field(ge=0)
    step: int = Field(ge=0)
    metrics: dict[str, float] = Field(default_factory=dict)
    is_ready_for_transition: bool = False


class FieldReport(Message):
    """What a graft really did; it closes every life cycle, whatever its end.

    Args:
        run_id: run that grew it.
        blueprint_id: name of the blueprint, e.g. `BP-MLP-GELU`.
        kernel_artifact_id: kernel that ran; empty when none was loaded.
        seed_id: full seed id, `layer#chunk.slot`.
        site: where it lived.
        pre_metric: decision metric before the seed germinated, in the task's unit; `None` if not measured.
        post_metric: the same metric when the life cycle ended.
        counterfactual: the gate's paired measurement; `None` when the seed was never evaluated.
        outcome: state in which the life cycle ended, one of `FINAL`.
        reason: why it ended so.
        cost: price at the site's real shape.
        stage_epochs: epochs spent in each state.
        stage_steps: optimizer steps spent in each state.
        eval_metrics: further measurements of the gate, by name.
        grafting_strategy: strategy that ramped it in; empty if it never grafted.
        dims: sizes given to the blueprint's free dimensions.
        group: trial that it belonged to; empty outside a trial.
        site_kind: family of the host's module, such as `attention`; empty where it was not told.
    """

    SCHEMA: ClassVar[str] = "1.1"
    schema_version: str = "1.1"
    run_id: str
    blueprint_id: str
    kernel_artifact_id: str = ""
    seed_id: str
    site: SiteInfo
    pre_metric: float | None = None
    post_metric: float | None = None
    counterfactual: Counterfactual | None = None
    outcome: SeedState
    reason: Reason
    cost: Cost = Field(default_factory=Cost)
    stage_epochs: dict[SeedState, int] = Field(default_factory=dict)
    stage_steps: dict[SeedState, int] = Field(default_factory=dict)
    eval_metrics: dict[str, float] = Field(default_factory=dict)
    grafting_strategy: str = ""
    dims: dict[str, int] = Field(default_factory=dict)
    group: str = ""
    site_kind: str = ""

    @model_validator(mode="after")
    def _ended(self) -> Self:
        """Refuse a report about a seed whose life goes on."""
        if self.outcome not in FINAL:
            raise ValueError(f"outcome {self.outcome} does not end a life cycle; allowed: {', '.join(sorted(FINAL))}")
        return self
