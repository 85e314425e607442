"""The contract of a policy."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

from esper.leyline.states import SeedState
from esper.tamiyo.config import TamiyoConfig, params_of, steps_of
from esper.tamiyo.contracts import Decision, Observation
from esper.tamiyo.menu import Menu, Offer, Room

_GONE = frozenset({SeedState.DORMANT, SeedState.CULLED, SeedState.CANCELLED, SeedState.ROLLED_BACK})


class Policy(ABC):
    """Proposes germinations. Holds no state: the same observation always gives the same decision.

    Args:
        config: settings of the controller.
        menu: blueprints that may grow.
    """

    def __init__(self, config: TamiyoConfig, menu: Menu) -> None:
        """Remember both."""
        self.config, self.menu = config, menu

    @abstractmethod
    def propose(self, observation: Observation) -> Decision:
        """Return the germinations to begin now; called only while no adaptation is under way."""

    def foresee(self, observation: Observation) -> list[Offer]:
        """Return the offers that may soon be needed, so that their kernels are ready in time."""
        return []


def remaining(observation: Observation, config: TamiyoConfig) -> Room:
    """Return what growth may still add; an amount of work is not limited while the host's is not known."""
    living = [s for s in observation.seeds if s.state not in _GONE]
    host = observation.work.host
    macs = config.budget_macs
    if macs is not None and macs < 1:
        macs = macs * host if host else None
    return Room(
        params_of(config.budget, observation.host_params) - sum(s.params for s in living),
        _left(macs, (s.macs for s in living)),
        _left(config.budget_ms, (s.latency_ms for s in living)),
        _left(config.budget_mb, (s.memory_mb for s in living)),
    )


def _left(budget: float | None, used: Iterable[float]) -> float:
    return math.inf if budget is None else budget - sum(used)


def due(observation: Observation, config: TamiyoConfig, count: int) -> bool:
    """Return whether germination number `count` (from 0) is due: by period, and by plateau where asked for."""
    total = observation.total_steps
    reached = observation.step >= steps_of(config.start, total) + count * steps_of(config.period, total)
    return reached and (config.plateau is None or on_plateau(observation.losses, config.plateau))


def on_plateau(losses: tuple[float, ...], fraction: float) -> bool:
    """Return whether the loss improved by less than `fraction` over the last two boundaries."""
    if len(losses) < 3:
        return False
    return losses[-3] - losses[-1] < fraction * abs(losses[-3])
