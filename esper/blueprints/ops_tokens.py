"""Operations that mix positions: causal convolution and attention over tokens, 2-d convolution over pixels.

Letters in shapes: B batch, T tokens, C features, K kernel, N heads, H and W image size.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints.op import Op, Size, Value
from esper.blueprints.ops_linear import Start, reset_uniform
from esper.blueprints.site import Layout
from esper.leyline.errors import BlueprintDoesNotFit


class CausalConv(Op):
    """Convolution over tokens that sees the present token and `kernel - 1` before it.

    Args:
        out: features of the result.
        kernel: tokens seen, 1 to 64; default 4.
        dilation: distance between the tokens seen, 1 to 64; default 1.
        groups: groups of features that are mixed apart; the input's width makes it depthwise; default 1.
        bias: whether to add a bias.
        init: how weights start.
    """

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd",)
    MIXES_TOKENS: ClassVar[bool] = True
    PARAMETRIC: ClassVar[bool] = True
    out: Size
    kernel: int = Field(default=4, ge=1, le=64)
    dilation: int = Field(default=1, ge=1, le=64)
    groups: Size = 1
    bias: bool = True
    init: Start = "default"

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the input's shape with `out` features."""
        _check_groups(inputs[0].width, self.out, self.groups)
        return inputs[0]._replace(width=self.out)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `CausalConv1d`."""
        return CausalConv1d(inputs[0].width, self.out, self.kernel, self.groups, self.bias, device, self.dilation)

    def params(self, inputs: Sequence[Value]) -> int:
        """Return `kernel * in * out / groups`, plus `out` for the bias."""
        return (inputs[0].width // self.groups * self.kernel + self.bias) * self.out

    def macs(self, inputs: Sequence[Value]) -> int:
        """Return `T * kernel * in * out / groups`."""
        return inputs[0].tokens * (inputs[0].width // self.groups) * self.kernel * self.out

    def reset(self, module: nn.Module, generator: torch.Generator) -> None:
        """Draw the weights."""
        reset_uniform(module.get_submodule("conv"), self.init, generator)


class Conv2d(Op):
    """Convolution over an image that keeps its size.

    Args:
        out: channels of the result.
        kernel: side of the square kernel, odd; default 1.
        dilation: distance between the pixels seen, 1 to 8; default 1.
        groups: groups of channels that are mixed apart; the input's width makes it depthwise; default 1.
        bias: whether to add a bias.
        init: how weights start.
    """

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("bchw",)
    PARAMETRIC: ClassVar[bool] = True
    out: Size
    kernel: Literal[1, 3, 5, 7] = 1
    dilation: int = Field(default=1, ge=1, le=8)
    groups: Size = 1
    bias: bool = True
    init: Start = "default"

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the input's shape with `out` channels."""
        _check_groups(inputs[0].width, self.out, self.groups)
        return inputs[0]._replace(width=self.out)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `torch.nn.Conv2d` padded to keep the image size."""
        shape = (inputs[0].width, self.out, self.kernel, 1, self.kernel // 2 * self.dilation, self.dilation)
        return nn.Conv2d(*shape, groups=self.groups, bias=self.bias, device=device)

    def params(self, inputs: Sequence[Value]) -> int:
        """Return `kernel^2 * in * out / groups`, plus `out` for the bias."""
        return (inputs[0].width // self.groups * self.kernel**2 + self.bias) * self.out

    def macs(self, inputs: Sequence[Value]) -> int:
        """Return `H * W * kernel^2 * in * out / groups`."""
        return inputs[0].tokens * (inputs[0].width // self.groups) * self.kernel**2 * self.out

    def reset(self, module: nn.Module, generator: torch.Generator) -> None:
        """Draw the weights."""
        reset_uniform(module, self.init, generator)


class Attention(Op):
    """Multi-head scaled dot-product attention over queries, keys and values that lie side by side.

    `softmax(q k' / sqrt(a / heads)) v`, from an input of width 3a to a result of width a.

    Args:
        heads: number of heads; it must divide a; default 4.
        causal: whether a token is blind to those after it; default true.
    """

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd",)
    MIXES_TOKENS: ClassVar[bool] = True
    heads: Size = 4
    causal: bool = True

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the input's shape at a third of its width."""
        width = inputs[0].width
        if width % (3 * self.heads):
            raise BlueprintDoesNotFit(
                f"its input is {width} wide; {self.heads} heads need a multiple of {3 * self.heads}."
            )
        return inputs[0]._replace(width=width // 3)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `PackedAttention`."""
        return PackedAttention(self.heads, self.causal)

    def macs(self, inputs: Sequence[Value]) -> int:
        """Return `2 * T^2 * a`: the scores and the sums, without credit for the masked half."""
        return 2 * inputs[0].tokens ** 2 * (inputs[0].width // 3)

    def scratch(self, inputs: Sequence[Value]) -> int:
        """Return `heads * T^2`, the scores."""
        return self.heads * inputs[0].tokens ** 2


def _check_groups(width: int, out: int, groups: int) -> None:
    if width % groups or out % groups:
        raise BlueprintDoesNotFit(f"{groups} groups must divide both the {width} features in and the {out} out.")


class CausalConv1d(nn.Module):
    """Convolution over the token axis, padded on the left only.

    Args:
        width: features of the input.
        out: features of the result.
        kernel: tokens seen.
        groups: groups of features.
        bias: whether to add a bias.
        device: where the weights live.
        dilation: distance between the tokens seen.

    Shapes:
        x: (B, T, width); result (B, T, out).
    """

    def __init__(
        self, width: int, out: int, kernel: int, groups: int, bias: bool, device: str, dilation: int = 1
    ) -> None:
        """Hold the convolution, not yet initialised."""
        super().__init__()
        self.conv = nn.Conv1d(width, out, kernel, dilation=dilation, groups=groups, bias=bias, device=device)
        self.pad = (kernel - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolved tokens."""
        return torch.transpose(self.conv(F.pad(x.transpose(1, 2), (self.pad, 0))), 1, 2)


class PackedAttention(nn.Module):
    """Attention over queries, keys and values packed along the feature axis.

    Args:
        heads: number of heads N.
        causal: whether to mask later tokens.

    Shapes:
        x: (B, T, 3a); result (B, T, a).
    """

    def __init__(self, heads: int, causal: bool) -> None:
        """Hold the settings; there are no weights."""
        super().__init__()
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended values."""
        q_BNTC, k_BNTC, v_BNTC = torch.unflatten(x, -1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q_BNTC, k_BNTC, v_BNTC, is_causal=self.causal)
        return mixed.transpose(1, 2).flatten(2)
