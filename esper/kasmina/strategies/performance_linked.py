"""A ramp that advances only while the training loss does not get worse."""

import math
from typing import final

from esper.kasmina.strategies.base import GraftingStrategy, GraftObservation


@final
class PerformanceLinked(GraftingStrategy):
    """Holds alpha while a fast mean of the loss lies above a slow one by more than `tolerance`.

    Both are exponential means, with weights .2 and .02 on the newest loss.

    Args:
        ramp_steps: steps from 0 to 1 when the loss never gets worse.
        tolerance: relative excess of the fast mean that is allowed.
    """

    def __init__(self, *, ramp_steps: int, tolerance: float = 0.05) -> None:
        """Start without a loss history."""
        super().__init__(ramp_steps=ramp_steps)
        self.tolerance = tolerance
        self.fast: float | None = None
        self.slow: float | None = None

    def update(self, observation: GraftObservation) -> float:
        """Advance unless the loss is getting worse; one that is not finite counts as worse and is not remembered."""
        if not math.isfinite(observation.loss):
            return self.alpha
        fast = self.fast if self.fast is not None else observation.loss
        slow = self.slow if self.slow is not None else observation.loss
        self.fast = fast + 0.2 * (observation.loss - fast)
        self.slow = slow + 0.02 * (observation.loss - slow)
        worse = self.fast > self.slow + self.tolerance * abs(self.slow)
        return self.alpha if worse else self._advance()
