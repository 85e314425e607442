"""Two interleaved spirals in the plane: the data of task A."""

import math

import torch
from torch import Tensor

from esper.data.base import EsperDataModule, Parts, require_positive, split_tensors
from esper.data.samplers import generator_for
from esper.leyline.errors import ConfigError

POINTS_SEED = 1234


class Spirals(EsperDataModule):
    """Two noisy spirals, to be told apart.

    A point of class c at radius r is `r * (cos a, sin a)` with `a = 2 pi turns r + pi c`, plus Gaussian
    noise; r is the root of a uniform number, which spreads the points evenly along the long outer turns.

    Args:
        turns: full turns of each spiral.
        noise: standard deviation of the noise; the outer radius is 1.
        train: points to train on.
        decision: points that gates decide on.
        report: points that reported numbers come from.
        batch_size: points in a training batch, B.
        seed: chooses the order of training; the points do not depend on it.
        num_workers: loader processes.

    Shapes:
        batch: `(x [B, 2] float32, y [B] int64)`, y 0 or 1.

    Raises:
        ConfigError: a number is out of range.

    Example:
        >>> x, y = next(iter(Spirals(batch_size=4).train_dataloader()))
        >>> x.shape, y.dtype
        (torch.Size([4, 2]), torch.int64)
    """

    def __init__(
        self,
        *,
        turns: float = 3,
        noise: float = 0.03,
        train: int = 2000,
        decision: int = 1000,
        report: int = 4000,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        """Check the settings; points are made at the first use."""
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        require_positive(train=train, decision=decision, report=report)
        if not (math.isfinite(turns) and turns > 0 and math.isfinite(noise) and noise >= 0):
            raise ConfigError(f"turns must be positive and noise 0 or more; given turns={turns}, noise={noise}.")
        self.turns, self.noise = turns, noise
        self.sizes = (train, decision, report)

    def build(self) -> Parts:
        """Draw the points of all parts and cut them."""
        x, y = spiral_points(sum(self.sizes), turns=self.turns, noise=self.noise)
        return split_tensors(x, y, self.sizes)


def spiral_points(count: int, *, turns: float, noise: float) -> tuple[Tensor, Tensor]:
    """Return `count` points and their classes, always the same ones.

    Shapes:
        result: `(x [count, 2] float32, y [count] int64)`.
    """
    generator = generator_for(POINTS_SEED)
    y = torch.randint(2, (count,), generator=generator)
    r = torch.rand(count, generator=generator).sqrt()
    angle = math.pi * (2 * turns * r + y)
    clean = torch.stack((r * angle.cos(), r * angle.sin()), dim=1)
    return clean + noise * torch.randn(count, 2, generator=generator), y
