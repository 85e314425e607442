"""Grafting strategies: how alpha goes from 0 to 1."""

from types import MappingProxyType

from esper.kasmina.strategies.base import GraftingStrategy, GraftObservation
from esper.kasmina.strategies.drift_controlled import DriftControlled
from esper.kasmina.strategies.fixed_ramp import FixedRamp
from esper.kasmina.strategies.grad_norm_gated import GradNormGated
from esper.kasmina.strategies.performance_linked import PerformanceLinked
from esper.leyline.errors import ConfigError

STRATEGIES = MappingProxyType(
    {
        "fixed_ramp": FixedRamp,
        "performance_linked": PerformanceLinked,
        "drift_controlled": DriftControlled,
        "grad_norm_gated": GradNormGated,
    }
)


def make_strategy(name: str, ramp_steps: int) -> GraftingStrategy:
    """Return a fresh strategy by its registered name.

    Raises:
        ConfigError: no strategy has this name.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"unknown grafting strategy {name!r}; allowed: {', '.join(STRATEGIES)}.")
    strategy: GraftingStrategy = STRATEGIES[name](ramp_steps=ramp_steps)
    return strategy


__all__ = [
    "STRATEGIES",
    "DriftControlled",
    "FixedRamp",
    "GradNormGated",
    "GraftObservation",
    "GraftingStrategy",
    "PerformanceLinked",
    "make_strategy",
]
