"""Settings of the controller."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from esper.config import Settings


def _plain_off(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class Planting(Settings):
    """One entry of the `schedule` policy.

    Args:
        at: training step (an integer from 1) or fraction of the run (below 1) at which it germinates.
        blueprint: name of the blueprint.
        site: glob over module paths; the first match that fits is taken.
        params: most parameters of the child; None takes the whole budget.
    """

    at: float = Field(ge=0)
    blueprint: str
    site: str = "*"
    params: int | None = Field(default=None, ge=1)


class RollbackConfig(Settings):
    """When a fit goes back to its last good snapshot, and what it then does.

    Args:
        window: snapshots that are kept, one per boundary; 0 switches rollback off.
        memory_gb: most memory of all snapshots, in GiB; the oldest leave first, the newest always stays.
        keep_on: where snapshots live: `cpu` memory, or the `same` device as the model.
        spike: smallest robust z-score of a training loss that counts as a spike; None looks for none.
        spike_patience: batches in a row that must be above it.
        spike_window: losses that the score is taken over.
        spike_minimum: losses that must be known before anything counts as a spike.
        worsening: Tamiyo asks for a rollback when, with a child in effect, the decision loss is worse than at the first
            boundary and above `1 + worsening` times what it was before that child; None never asks.
        relapse_steps: a fault that comes back within so many steps of a rollback goes one snapshot further back.
        conservative: training steps after a rollback without germination; below 1 a fraction of the run.
    """

    window: int = Field(default=5, ge=0)
    memory_gb: float = Field(default=4.0, gt=0)
    keep_on: Literal["cpu", "same"] = "cpu"
    spike: float | None = Field(default=6.0, gt=0)
    spike_patience: int = Field(default=5, ge=1)
    spike_window: int = Field(default=50, ge=2)
    spike_minimum: int = Field(default=20, ge=2)
    worsening: float | None = Field(default=1.0, gt=0)
    relapse_steps: int = Field(default=20, ge=1)
    conservative: float = Field(default=0.05, ge=0)


class TamiyoConfig(Settings):
    """How growth is decided. Steps are training steps; a number below 1 is a fraction of the run.

    Args:
        policy: `off`, `random`, `schedule`, `heuristic` (the live trial) or `gradmax` (widening where gradients say).
        menu: names of the blueprints that may grow; None takes those of the host's family, see
            `esper.blueprints.families`.
        budget: parameters that growth may add: a count, or a fraction of the host's when below 1.
        budget_macs: multiply-accumulates per sample that growth may add: a count, or a fraction of the host's when
            below 1; None does not limit them.
        budget_ms: forward time of 8 samples that growth may add, in milliseconds; None does not limit it.
        budget_mb: memory in training that growth may take, in MiB; None does not limit it.
        overhead: most work that the search may cost (children on trial, and the passes that judge them), as a fraction
            of the run's training; a trial that would cost more leaves out its dearest kinds. None does not limit it.
        proxy: parameters of each proxy of a trial: a count, or a fraction of the host's when below 1.
        start: when the first germination may happen.
        period: time between germinations of `random`, and between the trials of `heuristic`.
        trials: most growth points of `heuristic`, which share the budget; none comes after one at which no kind stood
            out. Plantings of `random`.
        plateau: germinate only once the decision loss improved by less than this fraction over two boundaries;
            None does not wait for a plateau.
        standout: smallest gain of a trial's winner, as a fraction of the decision loss, for the rest of the budget to
            follow its kind.
        below_standout: what happens when no kind stands out: `nothing`, or `widen`: if the menu has BP-WIDEN, new units
            are spread over the blocks (on tokens gated ones, BP-WIDEN-SWIGLU) and judged at the end of the run.
        min_effect: smallest lower bound of a kept graft's gain, in the unit of the loss.
        price_per_kparam: gain that every thousand added parameters must pay for, in the unit of the loss.
        price_per_mmac: the same for every million multiply-accumulates per sample.
        price_per_ms: the same for every millisecond of a forward of 8 samples: Urabrask's where the kernel is compiled,
            else the estimate.
        rank_by: what the gains of a trial are divided by: `params`, `macs` or `latency`.
        confidence: one-sided confidence of the gate, in (.5, 1).
        decision_samples: most paired samples of the decision part that a judgement uses.
        experience: field reports of earlier runs to learn from: a `fieldreports.jsonl`, a folder of runs, or the folder
            of a forge. Kinds that were found wanting stay out of a trial, and places rank by what they gained. None
            learns nothing.
        schedule: plantings of the `schedule` policy.
        seed: seed of random choices and of the children's initial weights.
        rollback: when a fit goes back to its last good snapshot.
    """

    policy: Annotated[Literal["off", "random", "schedule", "heuristic", "gradmax"], BeforeValidator(_plain_off)] = (
        "heuristic"
    )
    menu: tuple[str, ...] | None = None
    budget: float = Field(default=0.15, gt=0)
    budget_macs: float | None = Field(default=None, gt=0)
    budget_ms: float | None = Field(default=None, gt=0)
    budget_mb: float | None = Field(default=None, gt=0)
    overhead: float | None = Field(default=0.2, gt=0)
    proxy: float = Field(default=0.02, gt=0)
    start: float = Field(default=0.12, ge=0)
    period: float = Field(default=0.25, gt=0)
    trials: int = Field(default=1, ge=1)
    plateau: float | None = Field(default=None, gt=0, lt=1)
    standout: float = Field(default=0.015, ge=0)
    below_standout: Literal["nothing", "widen"] = "widen"
    min_effect: float = Field(default=0.0, ge=0)
    price_per_kparam: float = Field(default=0.0005, ge=0)
    price_per_mmac: float = Field(default=0.0, ge=0)
    price_per_ms: float = Field(default=0.0, ge=0)
    rank_by: Literal["params", "macs", "latency"] = "params"
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    decision_samples: int = Field(default=32, ge=2)
    experience: str | None = None
    schedule: tuple[Planting, ...] = ()
    seed: int = Field(default=0, ge=0)
    rollback: RollbackConfig = RollbackConfig()


def steps_of(value: float, total: int) -> int:
    """Return a duration in steps: a value below 1 is a fraction of `total`.

    Example:
        >>> steps_of(0.25, 200), steps_of(30, 200)
        (50, 30)
    """
    return round(value * total) if value < 1 else round(value)


def params_of(value: float, host_params: int) -> int:
    """Return a parameter count: a value below 1 is a fraction of the host's."""
    return round(value * host_params) if value < 1 else round(value)
