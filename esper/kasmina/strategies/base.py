"""The contract of a grafting strategy."""

from abc import ABC, abstractmethod
from typing import NamedTuple


class GraftObservation(NamedTuple):
    """What a strategy sees after a training step.

    Args:
        loss: training loss of the step, in the task's unit.
        drift: relative change of the host layer's weights since grafting began, at least 0.
        grad_norm: gradient norm of the child.
    """

    loss: float
    drift: float = 0.0
    grad_norm: float = 0.0


class GraftingStrategy(ABC):
    """Moves alpha from 0 to 1, never back; its whole state is plain numbers.

    Args:
        ramp_steps: steps from 0 to 1 when nothing holds the ramp.
    """

    needs_drift = False
    needs_grad_norm = False

    def __init__(self, *, ramp_steps: int) -> None:
        """Start at alpha 0."""
        self.ramp_steps = ramp_steps
        self.steps = 0

    @abstractmethod
    def update(self, observation: GraftObservation) -> float:
        """Take one step and return alpha in [0, 1]."""

    def state_dict(self) -> dict[str, float]:
        """Return the state as plain numbers."""
        return {k: v for k, v in vars(self).items() if k != "ramp_steps" and v is not None}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take back what `state_dict` returned."""
        vars(self).update(state)

    def _advance(self) -> float:
        self.steps = min(self.steps + 1, self.ramp_steps)
        return self.alpha

    @property
    def alpha(self) -> float:
        """The present alpha in [0, 1]."""
        return min(1.0, self.steps / self.ramp_steps)
