"""Operations on whole images.

Letters in shapes: B batch, C channels, H and W image size.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from esper.blueprints.op import Op, Value
from esper.blueprints.site import Layout


class Pool(Op):
    """Mean of each channel over all pixels; what it is multiplied with or added to is stretched over the image."""

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("bchw",)

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the input's channels at one pixel."""
        return inputs[0]._replace(tokens=1)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `GlobalMean`."""
        return GlobalMean()


class ResponseNorm(Op):
    """Global response normalisation (Woo et al., 2023): each channel times its share in the image's response.

    `x_c * |x_c| / mean_i |x_i|`, |x_c| the root mean square of channel c over the pixels; no learned numbers.

    Args:
        eps: added to the mean; default 1e-6.
    """

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("bchw",)
    eps: float = Field(default=1e-6, gt=0, le=1)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `GlobalResponse`."""
        return GlobalResponse(self.eps)


class GlobalMean(nn.Module):
    """Mean over the pixels.

    Shapes:
        x: (B, C, H, W); result (B, C, 1, 1).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the means."""
        return x.mean((2, 3), keepdim=True)


class GlobalResponse(nn.Module):
    """Scales channels by their share in the response of the image.

    Args:
        eps: added to the mean response.

    Shapes:
        x: (B, C, H, W); the result is the same.
    """

    def __init__(self, eps: float) -> None:
        """Hold the setting; there are no weights."""
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled channels."""
        response = torch.sqrt(x.float().square().mean((2, 3), keepdim=True) + self.eps)
        return x * (response / (response.mean(1, keepdim=True) + self.eps)).to(x.dtype)
