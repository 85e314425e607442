"""A ramp that pauses while the host layer's weights move too fast."""

import math
from typing import final

from esper.kasmina.strategies.base import GraftingStrategy, GraftObservation


@final
class DriftControlled(GraftingStrategy):
    """Pauses while the weights' drift *per step* is above `threshold`.

    Drift is `|w - w0| / |w0|` of the host layer since grafting began; what counts is its growth in one step.

    Args:
        ramp_steps: steps from 0 to 1 without a pause.
        threshold: largest relative drift per step.
    """

    needs_drift = True

    def __init__(self, *, ramp_steps: int, threshold: float = 0.02) -> None:
        """Start with no drift seen."""
        super().__init__(ramp_steps=ramp_steps)
        self.threshold = threshold
        self.seen = 0.0

    def update(self, observation: GraftObservation) -> float:
        """Advance unless the weights moved too far in this step, or nowhere that a number can name."""
        if not math.isfinite(observation.drift):
            return self.alpha
        step, self.seen = abs(observation.drift - self.seen), observation.drift
        return self.alpha if step > self.threshold else self._advance()
