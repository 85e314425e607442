"""The contract of a policy."""

from abc import ABC, abstractmethod

from esper.leyline.states import SeedState
from esper.tamiyo.config import TamiyoConfig, params_of, steps_of
from esper.tamiyo.contracts import Decision, Observation
from esper.tamiyo.menu import Menu, Offer

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


def remaining(observation: Observation, config: TamiyoConfig) -> int:
    """Return how many parameters growth may still add."""
    living = sum(s.params for s in observation.seeds if s.state not in _GONE)
    return params_of(config.budget, observation.host_params) - living


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
