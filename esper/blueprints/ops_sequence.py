"""Operations that carry something along the tokens: shifts, centred convolutions, recurrences that are linear in time.

A linear recurrence `h_t = a_t h_(t-1) + u_t` is computed by doubling: after k rounds each token holds the sum over the
last 2^k tokens. The number of rounds is the blueprint's, so the memory ends after `reach` tokens, for texts of any
length.

Letters in shapes: B batch, T tokens, C features.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints.op import Op, Value, same_width
from esper.blueprints.ops_linear import Start, reset_uniform
from esper.blueprints.site import Layout
from esper.leyline.errors import BlueprintDoesNotFit

Reach = Literal[2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
"""Tokens that a recurrence remembers."""


class TokenShift(Op):
    """The features of an earlier token; zeros where there is none.

    Args:
        by: how many tokens earlier, 1 to 64; default 1.
    """

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd",)
    MIXES_TOKENS: ClassVar[bool] = True
    by: int = Field(default=1, ge=1, le=64)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `Shift`."""
        return Shift(self.by)


class CentredConv(Op):
    """Depthwise convolution over the tokens on both sides: for hosts that read a whole text at once.

    Args:
        kernel: tokens seen, odd; default 7.
        bias: whether to add a bias.
        init: how weights start.
    """

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd",)
    MIXES_TOKENS: ClassVar[bool] = True
    PARAMETRIC: ClassVar[bool] = True
    kernel: Literal[3, 5, 7, 9, 15, 31] = 7
    bias: bool = True
    init: Start = "default"

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `CentredConv1d`."""
        return CentredConv1d(inputs[0].width, self.kernel, self.bias, device)

    def params(self, inputs: Sequence[Value]) -> int:
        """Return `kernel * in`, plus `in` for the bias."""
        return (self.kernel + self.bias) * inputs[0].width

    def macs(self, inputs: Sequence[Value]) -> int:
        """Return `T * kernel * in`."""
        return inputs[0].tokens * self.kernel * inputs[0].width

    def reset(self, module: nn.Module, generator: torch.Generator) -> None:
        """Draw the weights."""
        reset_uniform(module.get_submodule("conv"), self.init, generator)


class _Recurrence(Op):
    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd",)
    MIXES_TOKENS: ClassVar[bool] = True
    reach: Reach = 256

    def scratch(self, inputs: Sequence[Value]) -> int:
        """Return what every round of the doubling makes."""
        return 2 * _rounds(self.reach) * inputs[0].width * inputs[0].tokens


class DecayScan(_Recurrence):
    """State space of one number for each feature: `h_t = a h_(t-1) + (1 - a) u_t`, each feature with its own learned a.

    At the start the memories `1 / (1 - a)` are spread evenly, on a scale of ratios, from 2 tokens to `reach`.

    Args:
        reach: tokens after which the memory ends; default 256.
    """

    PARAMETRIC: ClassVar[bool] = True

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `FixedDecay`."""
        return FixedDecay(inputs[0].width, self.reach, device)

    def params(self, inputs: Sequence[Value]) -> int:
        """Return the number of features."""
        return inputs[0].width

    def reset(self, module: nn.Module, generator: torch.Generator) -> None:
        """Spread the memories; nothing is drawn."""
        weight = module.get_parameter("weight")
        shares = torch.linspace(1.0, math.log2(self.reach), weight.numel(), device=weight.device)
        memory = torch.pow(2.0, shares)
        with torch.no_grad():
            weight.copy_(torch.log(memory - 1.0))


class GatedScan(_Recurrence):
    """Recurrence whose gate is read from the tokens: `h_t = (1 - z_t) h_(t-1) + z_t u_t`, z the sigmoid of an input.

    Its first input is the gate before the sigmoid, its second u. It is the minimal GRU of Feng et al., 2024.

    Args:
        reach: tokens after which the memory ends; default 256.
    """

    ARITY: ClassVar[int] = 2

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the common shape."""
        if inputs[0].width != inputs[1].width:
            raise BlueprintDoesNotFit(f"its inputs are {[v.width for v in inputs]} features wide; make them equal.")
        return same_width(inputs)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `GatedDecay`."""
        return GatedDecay(self.reach)


def _rounds(reach: int) -> int:
    return reach.bit_length() - 1


def _earlier(x_BTC: Tensor, by: int) -> Tensor:
    """Return the features of `by` tokens earlier, zeros before the first."""
    return F.pad(x_BTC, (0, 0, by, 0)).narrow(1, 0, x_BTC.shape[1])


class Shift(nn.Module):
    """Moves the tokens to the right.

    Args:
        by: number of places.

    Shapes:
        x: (B, T, C); the result is the same.
    """

    def __init__(self, by: int) -> None:
        """Hold the setting; there are no weights."""
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        """Return the earlier tokens."""
        return _earlier(x, self.by)


class CentredConv1d(nn.Module):
    """Depthwise convolution over the token axis, padded on both sides.

    Args:
        width: number of features.
        kernel: tokens seen.
        bias: whether to add a bias.
        device: where the weights live.

    Shapes:
        x: (B, T, width); the result is the same.
    """

    def __init__(self, width: int, kernel: int, bias: bool, device: str) -> None:
        """Hold the convolution, not yet initialised."""
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolved tokens."""
        return torch.transpose(self.conv(x.transpose(1, 2)), 1, 2)


class FixedDecay(nn.Module):
    """Mean of the past that fades at a learned rate for each feature; it is computed in single precision.

    Args:
        width: number of features.
        reach: tokens after which the memory ends, a power of two.
        device: where the rates live.

    Shapes:
        x: (B, T, width); the result is the same.
    """

    def __init__(self, width: int, reach: int, device: str) -> None:
        """Hold the rates, not yet initialised."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device=device))
        self.rounds = _rounds(reach)

    def forward(self, x: Tensor) -> Tensor:
        """Return the fading means."""
        decay = torch.sigmoid(self.weight.float())
        state = x.float() * (1 - decay)
        for power in range(self.rounds):
            state = state + decay * _earlier(state, 2**power)
            decay = decay * decay
        return state.to(x.dtype)


class GatedDecay(nn.Module):
    """Mean of the past that each token renews as far as its gate is open; it is computed in single precision.

    Args:
        reach: tokens after which the memory ends, a power of two.

    Shapes:
        gate, x: (B, T, C); the result is the same.
    """

    def __init__(self, reach: int) -> None:
        """Hold the setting; there are no weights."""
        super().__init__()
        self.rounds = _rounds(reach)

    def forward(self, gate: Tensor, x: Tensor) -> Tensor:
        """Return the renewed means."""
        renewed = torch.sigmoid(gate.float())
        kept, state = 1 - renewed, renewed * x.float()
        for power in range(self.rounds):
            state = state + kept * _earlier(state, 2**power)
            kept = kept * _earlier(kept, 2**power)
        return state.to(x.dtype)
