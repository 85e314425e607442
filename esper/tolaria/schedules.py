"""Learning-rate schedules."""

from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from esper.leyline.errors import ConfigError


@dataclass
class WarmupDecay:
    """Linear warm-up, constant, then linear decay to a floor over the last part of the run.

    Args:
        total_steps: length of the run.
        warmup_steps: length of the warm-up.
        decay: fraction of the run over which the rate decays, in [0, 1].
        floor: final rate as a fraction of the peak, in [0, 1].

    Example:
        >>> shape = WarmupDecay(total_steps=100, warmup_steps=10, decay=0.5, floor=0.1)
        >>> [round(shape(step), 3) for step in (0, 9, 50, 75, 100)]
        [0.1, 1.0, 1.0, 0.55, 0.1]
    """

    total_steps: int
    warmup_steps: int = 0
    decay: float = 0.3
    floor: float = 0.05

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (0 <= self.decay <= 1 and 0 <= self.floor <= 1) or self.warmup_steps < 0 or self.total_steps < 1:
            raise ConfigError(f"{self}: decay and floor are in [0, 1], warmup_steps >= 0, total_steps >= 1.")

    def __call__(self, step: int) -> float:
        """Return the factor on the peak rate at a step."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        length = max(1.0, self.decay * self.total_steps)
        done = min(1.0, max(0.0, (step - (self.total_steps - length)) / length))
        return warm * (1 - (1 - self.floor) * done) if self.decay else warm

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """Return this shape as a scheduler."""
        return LambdaLR(optimizer, self)
