"""The weighted evaluation profile (WEP): how much each measurement counts in the one score of a kernel.

Every measurement is a ratio `r` to the eager module, 1 being as good as that; it scores `1 / (1 + r)`, so that half
as much scores 2/3, as much scores 1/2 and twice as much 1/3. The score is the weighted mean of these.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from esper.urabrask.findings import Measured

TRAINING: Final[Mapping[str, float]] = MappingProxyType({"step": 0.6, "forward": 0.2, "memory": 0.1, "drift": 0.1})
"""Weights for kernels that train: forward with backward, forward alone, peak memory, distance from float64."""

_UNIT: Final = 2.0**-23
"""Rounding of single precision; below it, differences say nothing."""


def ratios(measured: Measured) -> dict[str, float]:
    """Return every measurement relative to the eager module's, below 1 being better."""
    return {
        "step": measured.step_ratio,
        "forward": measured.forward_ms / max(measured.eager_forward_ms, 1e-9),
        "memory": _share(measured.memory_mb, measured.eager_memory_mb, 1e-3),
        "drift": _share(measured.drift, measured.eager_drift, _UNIT),
    }


def score(found: Mapping[str, float], profile: Mapping[str, float] = TRAINING) -> float:
    """Return the score of a kernel by its ratios, 0 to 1, higher is better; 0.5 is as good as the eager module.

    Example:
        >>> score({"step": 1.0, "forward": 1.0, "memory": 1.0, "drift": 1.0})
        0.5
    """
    total = sum(profile.values())
    return round(sum(weight / (1.0 + found[name]) for name, weight in profile.items()) / total, 6)


def _share(one: float, other: float, unit: float) -> float:
    return max(one, unit) / max(other, unit)
