"""What is remembered of one adaptation, from its germination to its end."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from esper.leyline.states import SeedState


@dataclass
class SeedRecord:
    """The adaptation under way (or ended) in one seed. Plain data only, so that it is its own checkpoint.

    Args:
        seed_id: `layer#chunk.slot`.
        blueprint: name and version, e.g. `BP-MLP-GELU@1.0.0`.
        ir: the blueprint's IR as plain data.
        kernel_id: kernel artifact that runs; empty until loaded.
        reads: where the child reads, `output` or `input`.
        dims: sizes of the free dimensions.
        strategy: name of the grafting strategy.
        init_seed: seed of the child's initial weights.
        group: trial that the seed belongs to, or empty.
        birth: order of birth of the child in the model; -1 before birth.
        params: parameters of the child.
        macs: multiply-accumulates per sample.
        latency_ms: forward time of 8 samples, in milliseconds.
        memory_mb: memory in training, in MiB.
        state: life-cycle state.
        steps_in_stage: training steps since the last transition.
        stage_steps: steps spent in each stage.
        stage_epochs: epochs in which each stage began.
        pre_metric: decision loss at germination, or None.
        evidence: the last counterfactual (mean, lower, upper, n), or None.
        embargo: steps that a culled seed still stays closed.
        strategy_state: state of the grafting strategy.
        site: layout and sizes of the site when the child was born.
    """

    seed_id: str
    blueprint: str
    ir: dict[str, Any]
    reads: Literal["declared", "output", "input"]
    dims: dict[str, int]
    strategy: str
    init_seed: int
    group: str = ""
    kernel_id: str = ""
    birth: int = -1
    params: int = 0
    macs: int = 0
    latency_ms: float = 0.0
    memory_mb: float = 0.0
    state: str = SeedState.DORMANT.value
    steps_in_stage: int = 0
    stage_steps: dict[str, int] = field(default_factory=dict)
    stage_epochs: dict[str, int] = field(default_factory=dict)
    pre_metric: float | None = None
    evidence: list[float] | None = None
    embargo: int = 0
    strategy_state: dict[str, float] = field(default_factory=dict)
    site: dict[str, Any] = field(default_factory=dict)

    def enter(self, state: SeedState, epoch: int) -> None:
        """Move to a state and restart the stage's clock."""
        self.state, self.steps_in_stage = state.value, 0
        self.stage_epochs.setdefault(state.value, epoch)

    def tick(self) -> None:
        """Count one training step."""
        self.steps_in_stage += 1
        self.stage_steps[self.state] = self.stage_steps.get(self.state, 0) + 1

    def to_plain(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Self:
        """Take back what `to_plain` returned."""
        return cls(**data)
