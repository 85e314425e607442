"""Noisy pictures of five shapes: the data of the second vision task."""

import math

import torch
from torch import Tensor

from esper.data.base import EsperDataModule, Parts, require_positive, split_tensors
from esper.data.samplers import generator_for
from esper.leyline.errors import ConfigError

SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIDE = 16
PICTURES_SEED = 1234


class Shapes(EsperDataModule):
    """Circles, squares, triangles, crosses and rings of random size, place, angle and brightness, in Gaussian noise.

    Args:
        noise: standard deviation of each pixel's noise; a shape is .5 to 1 brighter than the ground, which is 0.
        train: pictures to train on.
        decision: pictures that gates decide on.
        report: pictures that reported numbers come from.
        batch_size: pictures in a training batch, B.
        seed: chooses the order of training; the pictures do not depend on it.
        num_workers: loader processes.

    Shapes:
        batch: `(x [B, 1, 16, 16] float32, y [B] int64)`, y the place in `SHAPES`.

    Raises:
        ConfigError: a number is out of range.

    Example:
        >>> x, y = next(iter(Shapes(batch_size=4, train=8).train_dataloader()))
        >>> x.shape, y.dtype
        (torch.Size([4, 1, 16, 16]), torch.int64)
    """

    def __init__(
        self,
        *,
        noise: float = 0.1,
        train: int = 4000,
        decision: int = 500,
        report: int = 2000,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        """Check the settings; pictures are made at the first use."""
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        require_positive(train=train, decision=decision, report=report)
        if not (math.isfinite(noise) and noise >= 0):
            raise ConfigError(f"noise must be 0 or more, not {noise}.")
        self.noise = noise
        self.sizes = (train, decision, report)

    def build(self) -> Parts:
        """Draw the pictures of all parts and cut them."""
        x, y = shape_pictures(sum(self.sizes), noise=self.noise)
        return split_tensors(x, y, self.sizes)


def shape_pictures(count: int, *, noise: float) -> tuple[Tensor, Tensor]:
    """Return `count` pictures and their classes, always the same ones.

    A shape is drawn by its distance d to the edge, in pixels and negative inside: `brightness * clamp(1/2 - d, 0, 1)`.

    Shapes:
        result: `(x [count, 1, 16, 16] float32, y [count] int64)`.
    """
    generator = generator_for(PICTURES_SEED)
    y = torch.randint(len(SHAPES), (count,), generator=generator)
    radius, row, column, angle, brightness = torch.rand(5, count, 1, 1, generator=generator)
    radius, angle = 3 + 3 * radius, 2 * math.pi * angle
    room = SIDE - 1 - 2 * radius
    grid = torch.arange(SIDE, dtype=torch.float32)
    down, right = grid[:, None] - radius - room * row, grid - radius - room * column
    u = (angle.cos() * right + angle.sin() * down) / radius
    v = (angle.cos() * down - angle.sin() * right) / radius
    edges = radius * torch.stack(_edges(u, v))[y, torch.arange(count)]
    clean = (0.5 + 0.5 * brightness) * (0.5 - edges).clamp(0, 1)
    return (clean + noise * torch.randn(clean.shape, generator=generator)).unsqueeze(1), y


def _edges(u: Tensor, v: Tensor) -> list[Tensor]:
    """Return how far outside of each shape a point is; every shape lies in the unit circle."""
    far, longer, shorter = torch.hypot(u, v), u.abs().maximum(v.abs()), u.abs().minimum(v.abs())
    triangle = v.maximum((3**0.5 * u.abs() - v) / 2) - 0.5
    return [far - 0.9, longer - 0.7, triangle, (longer - 0.95).maximum(shorter - 0.3), (far - 0.75).abs() - 0.2]
