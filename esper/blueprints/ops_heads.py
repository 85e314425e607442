"""What is done to each head of queries, keys or values apart: norm, rotary positions, eight bits.

Letters in shapes: B batch, T tokens, N heads, C features of a head.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from esper.blueprints.op import Op, Size, Value
from esper.blueprints.site import Layout
from esper.leyline.errors import BlueprintDoesNotFit


class _HeadOp(Op):
    """Something that is done to each head apart."""

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd",)
    heads: Size = 4

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the input's shape; the heads share its features evenly."""
        head_width(inputs[0].width, self.heads)
        return inputs[0]


class HeadNorm(_HeadOp):
    """Root mean square 1 over the features of each head, without learned gain.

    Args:
        heads: number of heads; it must divide the features; default 4.
    """

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `HeadRMSNorm`."""
        return HeadRMSNorm(self.heads)


class Rope(_HeadOp):
    """Rotary positions (Su et al., 2021): pairs of features turn with the token's place, each at a rate of its own.

    Args:
        heads: number of heads; each needs an even number of features; default 4.
        base: ratio of the fastest to the slowest rate, about; default 10,000.
    """

    base: float = Field(default=10_000.0, gt=1)

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the input's shape."""
        if head_width(inputs[0].width, self.heads) % 2:
            raise BlueprintDoesNotFit(f"{self.heads} heads of {inputs[0].width} features have no pairs to turn.")
        return inputs[0]

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `Rotation`."""
        return Rotation(self.heads, inputs[0].width // self.heads, self.base)


class FakeQuant(_HeadOp):
    """What 8 bits leave of each head's features: 255 steps up to the largest of them; the gradient passes as it is.

    Args:
        heads: number of heads, each with a step of its own; default 4.
    """

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd", "bd")

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `Rounded`."""
        return Rounded(self.heads)


def head_width(width: int, heads: int) -> int:
    """Return the features of each head.

    Raises:
        BlueprintDoesNotFit: the heads cannot share the features evenly.
    """
    if width % heads:
        raise BlueprintDoesNotFit(f"{heads} heads must divide the {width} features evenly.")
    return width // heads


class HeadRMSNorm(nn.Module):
    """Divides each head by the root mean square of its features.

    Args:
        heads: number of heads.

    Shapes:
        x: (B, T, N C); the result is the same.
    """

    def __init__(self, heads: int) -> None:
        """Hold the setting; there are no weights."""
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised heads."""
        x_BTNC = torch.unflatten(x, -1, (self.heads, -1))
        scale = torch.rsqrt(x_BTNC.float().square().mean(-1, keepdim=True) + 1e-6)
        return (x_BTNC * scale.to(x.dtype)).flatten(-2)


class Rotation(nn.Module):
    """Turns each pair of features (i, i + C/2) of a head by `place * base^(-2 i / C)`.

    Args:
        heads: number of heads.
        width: features C of a head.
        base: see `Rope`.

    Shapes:
        x: (B, T, N C); the result is the same.
    """

    def __init__(self, heads: int, width: int, base: float) -> None:
        """Hold the settings; there are no weights."""
        super().__init__()
        self.heads, self.width, self.base = heads, width, base

    def forward(self, x: Tensor) -> Tensor:
        """Return the turned features."""
        half = self.width // 2
        place_T1 = x.new_ones(x.shape[1], dtype=torch.int64).cumsum(0).unsqueeze(-1) - 1
        pair_P = x.new_ones(half, dtype=torch.int64).cumsum(0) - 1
        angle_T1P = (place_T1.float() * torch.pow(self.base, -pair_P.float() / half)).unsqueeze(1)
        cos, sin = angle_T1P.cos().to(x.dtype), angle_T1P.sin().to(x.dtype)
        one, two = torch.unflatten(x, -1, (self.heads, 2, half)).unbind(-2)
        return torch.stack((one * cos - two * sin, two * cos + one * sin), -2).flatten(-3)


class Rounded(nn.Module):
    """Rounds each head to multiples of a 127th of its largest feature; backwards it does nothing.

    Args:
        heads: number of heads.

    Shapes:
        x: (B, ..., N C); the result is the same.
    """

    straight_through = True
    """The gradient passes as if nothing were rounded."""

    def __init__(self, heads: int) -> None:
        """Hold the setting; there are no weights."""
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Return what an int8 copy would hold."""
        heads = torch.unflatten(x.detach().float(), -1, (self.heads, -1))
        step = heads.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        kept = (torch.round(heads / step) * step).flatten(-2).to(x.dtype)
        return x + (kept - x.detach())
