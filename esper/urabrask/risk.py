"""How likely a kernel is to do harm, by rules, and how sure we are of that.

`risk = 1 - product over features of (1 - weight * feature)`, each feature from 0 to 1. The features go into the report
as `risk.<feature>`, so that a model can be fitted to what became of the kernels, and take the rules' place.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from esper.urabrask.findings import Findings

WEIGHTS: Final[Mapping[str, float]] = MappingProxyType(
    {"native": 0.05, "nodes": 0.10, "margin": 0.35, "noise": 0.10, "tail": 0.10, "drift": 0.15}
)
"""Risk that a feature brings when it is 1 and all others are 0."""

LIMIT: Final = 0.5
"""A kernel of more risk than this is rejected."""

PREFIX: Final = "risk."
"""How the features are named in a report."""

_MOST_NODES: Final = 64
_LOUD: Final = 0.25
_LONG_TAIL: Final = 5.0
_FAR: Final = 10.0
_ENOUGH_CALLS: Final = 300


def features(findings: Findings) -> dict[str, float]:
    """Return the features of a kernel, each 0 to 1.

    `native` whether it brings native code, `nodes` its blueprint's size, `margin` how close it came to a tolerance,
    `noise` the spread of its measurements, `tail` how far its slowest calls are from the mean, `drift` how much
    further from float64 it is than its eager module.
    """
    found = {
        "native": float(findings.library_mb > 0.0),
        "nodes": _unit(findings.nodes / _MOST_NODES),
        "margin": _unit(findings.margin),
    }
    measured = findings.measured
    if measured is None:
        return {**found, "noise": 1.0, "tail": 1.0, "drift": 1.0}
    return {
        **found,
        "noise": _unit(measured.spread / _LOUD),
        "tail": _unit((measured.forward_ms_p99 / max(measured.forward_ms, 1e-9) - 1.0) / (_LONG_TAIL - 1.0)),
        "drift": _unit((measured.drift / max(measured.eager_drift, 1e-7) - 1.0) / (_FAR - 1.0)),
    }


def risk(found: Mapping[str, float]) -> float:
    """Return the risk of a kernel by its features, 0 to 1.

    Example:
        >>> risk(dict.fromkeys(WEIGHTS, 0.0)), 0.5 < risk(dict.fromkeys(WEIGHTS, 1.0)) < 1.0
        (0.0, True)
    """
    harmless = 1.0
    for name, weight in WEIGHTS.items():
        harmless *= 1.0 - weight * found[name]
    return round(1.0 - harmless, 6)


def confidence(findings: Findings) -> float:
    """Return how sure the verdict is, 0 to 1: a failure that was seen is certain, a pass rests on what was measured."""
    if findings.failures:
        return 1.0
    if findings.measured is None:
        return 0.0
    measured = findings.measured
    return round(0.9 * _unit(0.2 + measured.calls / _ENOUGH_CALLS) * (1.0 - 0.5 * _unit(measured.spread / _LOUD)), 6)


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))
