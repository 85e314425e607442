"""Operations that hold weights and act on each token alone: dense layers and gains."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from esper.blueprints.op import Op, Size, Value
from esper.blueprints.site import Layout

Start = Literal["default", "zero"]
"""`default` draws weight and bias from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as torch does; `zero` is all zeros."""


def reset_uniform(module: nn.Module, start: Start, generator: torch.Generator) -> None:
    """Initialise the weight and the bias of a dense or convolutional layer."""
    weight = module.get_parameter("weight")
    bound = 0.0 if start == "zero" else weight[0].numel() ** -0.5
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator)


class Linear(Op):
    """Dense layer over the features: `y = W x + b`.

    Args:
        out: features of the result.
        bias: whether to add b.
        init: how weights start.
    """

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd", "bd")
    AFFINE: ClassVar[bool] = True
    PARAMETRIC: ClassVar[bool] = True
    out: Size
    bias: bool = True
    init: Start = "default"

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the input's shape with `out` features."""
        return inputs[0]._replace(width=self.out)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `torch.nn.Linear`."""
        return nn.Linear(inputs[0].width, self.out, self.bias, device=device)

    def params(self, inputs: Sequence[Value]) -> int:
        """Return `in * out`, plus `out` for the bias."""
        return (inputs[0].width + self.bias) * self.out

    def macs(self, inputs: Sequence[Value]) -> int:
        """Return `tokens * in * out`."""
        return inputs[0].tokens * inputs[0].width * self.out

    def reset(self, module: nn.Module, generator: torch.Generator) -> None:
        """Draw the weights."""
        reset_uniform(module, self.init, generator)


class Gain(Op):
    """Learned gain on each feature: `y_i = g_i x_i`.

    Args:
        init: value of every gain at the start.
    """

    AFFINE: ClassVar[bool] = True
    PARAMETRIC: ClassVar[bool] = True
    init: Literal["one", "zero"] = "one"

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `FeatureGain`."""
        return FeatureGain(inputs[0].width, 2 if inputs[0].layout == "bchw" else 0, device)

    def params(self, inputs: Sequence[Value]) -> int:
        """Return the number of features."""
        return inputs[0].width

    def reset(self, module: nn.Module, generator: torch.Generator) -> None:
        """Set every gain to its start."""
        nn.init.constant_(module.get_parameter("weight"), float(self.init == "one"))


class FeatureGain(nn.Module):
    """Multiplies each feature by a learned number.

    Args:
        width: number of features.
        axes_after: number of axes that follow the feature axis: 2 for `bchw`, else 0.
        device: where the gains live.

    Shapes:
        x: (B, ..., width) or (B, width, H, W); the result is the same.
    """

    def __init__(self, width: int, axes_after: int, device: str) -> None:
        """Hold the gains, not yet initialised."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device=device))
        self.shape = (width, *(1,) * axes_after)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled features, in the precision of `x`."""
        return x * self.weight.to(x.dtype).view(self.shape)
