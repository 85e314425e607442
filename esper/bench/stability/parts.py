"""The three parts of the bench, and the rows that each wants."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from esper.bench.rows import Job

GRAFTS, DEFECTS, EFFICIENCY = "grafts", "defects", "efficiency"
PARTS: Final = {
    GRAFTS: "many grafts one after another: original loss, and drift on both sides of them",
    DEFECTS: "planted defects: how often the live trial mends them",
    EFFICIENCY: "gain per parameter on a new domain, beside full fine-tuning and low-rank adapters",
}
CONDITIONS: Final = tuple(
    (domain, host, child)
    for domain in ("new", "same")
    for host in ("frozen", "live")
    for child in ("plain", "rehearsed", "gated")
    if (domain, child) != ("same", "rehearsed")
)
"""Domain, host and child of each row of `grafts`; the original domain itself cannot be rehearsed beside itself."""
DEFECT_NAMES: Final = ("width", "dead", "skip", "locality")
ARM_NAMES: Final = ("full", "lora", "gelu", "conv")


class Plan(NamedTuple):
    """What is asked for.

    Args:
        parts: names of the parts.
        seeds: runs of each row.
        grafts: in a row of `grafts`.
        quick: few steps and a small host: whether all runs, not what it comes to.
    """

    parts: tuple[str, ...]
    seeds: int = 3
    grafts: int = 25
    quick: bool = False


def jobs(plan: Plan) -> list[Job]:
    """Return every row that is wanted, all of one seed before those of the next."""
    wanted = {GRAFTS: _grafts, DEFECTS: _defects, EFFICIENCY: _efficiency}
    return [job for seed in range(plan.seeds) for part in plan.parts for job in wanted[part](plan, seed)]


def _host(plan: Plan) -> dict[str, Any]:
    small = {"d_model": 16, "layers": 2, "heads": 2}
    return {"host_steps": 20, "sizes": small} if plan.quick else {"host_steps": 2400, "sizes": {}}


def _job(part: str, names: Sequence[str], seed: int, config: dict[str, Any]) -> Job:
    return Job("-".join((part, *names)), seed, {"part": part, "seed": seed, **config})


def _grafts(plan: Plan, seed: int) -> list[Job]:
    common = {"grafts": plan.grafts, "steps": 22 if plan.quick else 40, "share": 0.02} | _host(plan)
    if plan.quick:
        common["share"] = 0.1
    keys = ("domain", "host", "child")
    return [_job(GRAFTS, names, seed, {**common, **dict(zip(keys, names, strict=True))}) for names in CONDITIONS]


def _defects(plan: Plan, seed: int) -> list[Job]:
    steps = 100 if plan.quick else None
    return [_job(DEFECTS, (name,), seed, {"defect": name, "steps": steps}) for name in DEFECT_NAMES]


def _efficiency(plan: Plan, seed: int) -> list[Job]:
    common = {"steps": 24 if plan.quick else 400, "few": plan.quick} | _host(plan)
    return [_job(EFFICIENCY, (name,), seed, {"arm": name, **common}) for name in ARM_NAMES]
