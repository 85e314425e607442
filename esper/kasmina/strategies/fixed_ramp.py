"""A linear ramp of fixed length."""

from typing import final

from esper.kasmina.strategies.base import GraftingStrategy, GraftObservation


@final
class FixedRamp(GraftingStrategy):
    """`alpha = steps / ramp_steps`, whatever is observed.

    Example:
        >>> ramp = FixedRamp(ramp_steps=4)
        >>> [ramp.update(GraftObservation(loss=1.0)) for _ in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """

    def update(self, observation: GraftObservation) -> float:
        """Advance one step."""
        return self._advance()
