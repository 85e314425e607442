"""A ramp that pauses while the child's gradient norm lies outside a band."""

from typing import final

from esper.kasmina.strategies.base import GraftingStrategy, GraftObservation


@final
class GradNormGated(GraftingStrategy):
    """Advances only while `low <= grad_norm <= high`; a child at alpha 0 has no gradient yet and may start.

    Args:
        ramp_steps: steps from 0 to 1 inside the band.
        low: smallest gradient norm.
        high: largest gradient norm.
    """

    needs_grad_norm = True

    def __init__(self, *, ramp_steps: int, low: float = 1e-8, high: float = 10.0) -> None:
        """Start below the band's check."""
        super().__init__(ramp_steps=ramp_steps)
        self.low, self.high = low, high

    def update(self, observation: GraftObservation) -> float:
        """Advance inside the band, and always on the first step."""
        inside = self.low <= observation.grad_norm <= self.high
        return self._advance() if inside or self.steps == 0 else self.alpha
