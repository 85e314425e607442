"""What makes a run go back: triggers that look at one number per batch, and a verdict that ranks can agree on.

A verdict is an integer, 0 for "go on": the largest over all ranks is what they all act upon.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from statistics import median
from typing import Any, final

from esper.leyline.events import RollbackTrigger

GO_ON = 0
"""The verdict of a healthy batch."""

_ORDER = tuple(RollbackTrigger)
_NORMAL = 1.4826
"""Standard deviation of a normal variable over its median absolute deviation."""


def verdict_of(trigger: RollbackTrigger) -> int:
    """Return the verdict that stands for a trigger.

    Example:
        >>> trigger_of(verdict_of(RollbackTrigger.LOSS_SPIKE)).value
        'LOSS_SPIKE'
    """
    return _ORDER.index(trigger) + 1


def trigger_of(verdict: int) -> RollbackTrigger:
    """Return the trigger that a verdict stands for; it is not `GO_ON`."""
    return _ORDER[verdict - 1]


class Trigger(ABC):
    """Looks at the training loss of each batch. Its whole state is plain numbers and lists of them."""

    kind: RollbackTrigger

    @abstractmethod
    def observe(self, loss: float) -> bool:
        """Take in the loss of a batch; return whether the run must go back."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain data; a trigger without memory has none."""
        return {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        vars(self).update({name: list(value) if isinstance(value, list) else value for name, value in state.items()})


@final
class NonFiniteLoss(Trigger):
    """A loss that is no number, or infinite.

    Example:
        >>> NonFiniteLoss().observe(math.inf)
        True
    """

    kind = RollbackTrigger.NON_FINITE_LOSS

    def observe(self, loss: float) -> bool:
        """Return whether the loss is not finite."""
        return not math.isfinite(loss)


@final
class LossSpike(Trigger):
    """Losses that stay far above those before them.

    The robust z-score of a loss over a window of earlier ones is `(loss - median) / scale` with
    `scale = max(1.4826 * MAD, 0.05 * |median|, 0.02 * first)`, where MAD is the median absolute deviation and `first`
    the largest `|median|` so far: noise around a loss that has become small is no spike. A single batch is none
    either; a run must be above the threshold for some batches in a row. These do not enter the window.

    Args:
        threshold: smallest robust z-score of a spike.
        patience: batches in a row that must be above it.
        window: losses that are remembered.
        minimum: losses that must be remembered before anything is a spike.

    Example:
        >>> trigger = LossSpike(threshold=10.0, patience=2, window=50, minimum=3)
        >>> [trigger.observe(loss) for loss in (1.0, 1.1, 0.9, 1.0, 9.0, 1.0, 9.0, 9.0)]
        [False, False, False, False, False, False, False, True]
    """

    kind = RollbackTrigger.LOSS_SPIKE

    def __init__(self, *, threshold: float, patience: int, window: int, minimum: int) -> None:
        """Start without memory."""
        self.threshold, self.patience, self.window, self.minimum = threshold, patience, window, minimum
        self._losses: list[float] = []
        self._streak: list[float] = []
        self._first = 0.0

    def observe(self, loss: float) -> bool:
        """Return whether this loss completes a spike."""
        if self.score(loss) > self.threshold:
            self._streak.append(loss)
        else:
            self._remember((*self._streak, loss))
            self._streak.clear()
        return len(self._streak) >= self.patience

    def score(self, loss: float) -> float:
        """Return the robust z-score of a loss; 0 while too few are remembered, or for what is no number."""
        if len(self._losses) < self.minimum or not math.isfinite(loss):
            return 0.0
        centre = median(self._losses)
        spread = _NORMAL * median(abs(other - centre) for other in self._losses)
        self._first = max(self._first, abs(centre))
        scale = max(spread, 0.05 * abs(centre), 0.02 * self._first)
        return (loss - centre) / scale if scale > 0 else 0.0

    def _remember(self, losses: Iterable[float]) -> None:
        self._losses = [*self._losses, *(loss for loss in losses if math.isfinite(loss))][-self.window :]

    @property
    def calm(self) -> bool:
        """Whether no spike is building up."""
        return not self._streak
