"""Stage 3 of the gauntlet: tags by percentile among the kernels that ran on the same hardware.

A kernel is `fast-p90` when at least 90 of 100 peers have a larger ratio of forward and backward to their eager module;
`lean` is the same for peak memory, `exact` for the distance from float64. A kernel of a high percentile has the tags
of the lower ones too. Ratios are compared, as times of different shapes say nothing about each other. Until there are
20 peers, the percentiles are guessed by `RULES`, and the kernel is tagged `provisional`.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

from esper.leyline.kernels import UrabraskValidationReport
from esper.leyline.reports import HardwareContext
from esper.urabrask.findings import Findings
from esper.urabrask.limits import STEADY
from esper.urabrask.wep import ratios

ENOUGH: Final = 20
"""Peers from which on percentiles are counted."""

PERCENTILES: Final = (50, 75, 90, 99)
"""Percentiles that have a tag."""

RULES: Final[Mapping[str, Mapping[int, float]]] = MappingProxyType(
    {
        "fast": {50: 0.90, 75: 0.80, 90: 0.65},
        "lean": {50: 1.10, 75: 1.00, 90: 0.75},
        "exact": {50: 5e-6, 75: 1e-6, 90: 3e-7},
    }
)
"""Largest value for a percentile while there are too few peers; nothing is p99 by rule."""


class Standing(NamedTuple):
    """What kernels are compared by: smaller is better.

    Args:
        fast: time of forward and backward relative to the eager module.
        lean: peak memory relative to the eager module.
        exact: relative difference from float64.
    """

    fast: float
    lean: float
    exact: float


def tags(findings: Findings, layout: str, dtype: str, peers: Sequence[Standing]) -> tuple[str, ...]:
    """Return the tags of a kernel that was measured, sorted.

    Args:
        findings: what the gauntlet found.
        layout: axes of its site.
        dtype: its precision.
        peers: the other compiled kernels that passed on the same hardware.
    """
    measured = findings.measured
    found = {findings.pipeline, layout, dtype, findings.hardware.device_type}
    if measured is None:
        return tuple(sorted(found))
    found.add("eager" if findings.pipeline == "fast" else "compiled")
    if measured.spread > STEADY:
        found.add("noisy")
    if findings.pipeline != "fast":
        found.update(_standing_tags(standing(findings), peers))
    return tuple(sorted(found))


def standing(findings: Findings) -> Standing:
    """Return what a measured kernel is compared by."""
    assert findings.measured is not None
    found = ratios(findings.measured)
    return Standing(found["step"], found["memory"], findings.measured.drift)


def peers_of(reports: Iterable[UrabraskValidationReport], hardware: HardwareContext) -> list[Standing]:
    """Return the standing of every compiled kernel that passed on this hardware."""
    return [
        Standing(r.baseline_comparison["step"], r.baseline_comparison["memory"], r.benchmark_results.precision_drift)
        for r in reports
        if r.passed_validation
        and r.benchmark_results is not None
        and {"step", "memory"} <= r.baseline_comparison.keys()
        and "compiled" in r.generated_tags
        and (r.hardware_context.device_type, r.hardware_context.device_name)
        == (hardware.device_type, hardware.device_name)
    ]


def _standing_tags(own: Standing, peers: Sequence[Standing]) -> set[str]:
    by_rule = len(peers) < ENOUGH
    found = {"provisional"} if by_rule else set()
    for name, value in own._asdict().items():
        others = [getattr(peer, name) for peer in peers]
        reached = _by_rule(name, value) if by_rule else _by_rank(value, others)
        found.update(f"{name}-p{percentile}" for percentile in reached)
    return found


def _by_rule(name: str, value: float) -> list[int]:
    return [percentile for percentile, bound in RULES[name].items() if value <= bound]


def _by_rank(value: float, others: Sequence[float]) -> list[int]:
    worse = 100 * sum(other > value for other in others)
    return [percentile for percentile in PERCENTILES if worse >= percentile * len(others)]
