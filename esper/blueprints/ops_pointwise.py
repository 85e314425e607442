"""Operations without weights: activations, normalisations, sums and products."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Final, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints.op import Op, Value, same_width
from esper.blueprints.site import Layout
from esper.leyline.errors import BlueprintDoesNotFit


class SquaredReLU(nn.Module):
    """`max(x, 0)^2`, the activation of Primer (So et al., 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the squared positive part."""
        return F.relu(x).square()


_ACTIVATIONS: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class Activation(Op):
    """A function of each number alone.

    Args:
        fn: which function.
    """

    fn: Literal["gelu", "relu", "relu2", "sigmoid", "silu", "tanh"]

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return the activation module."""
        return _ACTIVATIONS[self.fn]()


class LayerNorm(Op):
    """Mean 0 and variance 1 over the features of each token, without learned gain or offset.

    Args:
        eps: added to the variance; default 1e-5.
    """

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("btd", "bd")
    eps: float = Field(default=1e-5, gt=0, le=1)

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the input's shape; one feature alone has no variance to normalise."""
        if inputs[0].width < 2:
            raise BlueprintDoesNotFit("layer norm of a single feature is always zero; it needs two or more.")
        return inputs[0]

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `torch.nn.LayerNorm`."""
        return nn.LayerNorm(inputs[0].width, self.eps, elementwise_affine=False, device=device)


class RMSNorm(Op):
    """Root mean square 1 over the features of each position, without learned gain.

    Args:
        eps: added to the mean square; default 1e-6.
    """

    eps: float = Field(default=1e-6, gt=0, le=1)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `FeatureRMSNorm`."""
        return FeatureRMSNorm(inputs[0].width, 1 if inputs[0].layout == "bchw" else -1, self.eps)


class GroupNorm(Op):
    """Mean 0 and variance 1 over the channels and pixels of each group, without learned gain or offset.

    Args:
        groups: number of groups; it must divide the channels; default 1.
        eps: added to the variance; default 1e-5.
    """

    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("bchw",)
    groups: int = Field(default=1, ge=1)
    eps: float = Field(default=1e-5, gt=0, le=1)

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the input's shape; each group needs two numbers or more."""
        width, tokens = inputs[0].width, inputs[0].tokens
        if width % self.groups or width // self.groups * tokens < 2:
            raise BlueprintDoesNotFit(f"{self.groups} groups cannot normalise {width} channels of {tokens} pixels.")
        return inputs[0]

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `torch.nn.GroupNorm`."""
        return nn.GroupNorm(self.groups, inputs[0].width, self.eps, affine=False, device=device)


class Add(Op):
    """Sum of two values; one feature is stretched over many."""

    ARITY: ClassVar[int] = 2
    AFFINE: ClassVar[bool] = True

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the common shape."""
        return same_width(inputs)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `Sum`."""
        return Sum()


class Mul(Op):
    """Product of two values; one feature is stretched over many."""

    ARITY: ClassVar[int] = 2

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the common shape."""
        return same_width(inputs)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `Product`."""
        return Product()


class FeatureRMSNorm(nn.Module):
    """Divides by the root mean square over the feature axis.

    Args:
        width: number of features.
        axis: the feature axis, -1 or 1.
        eps: added to the mean square.

    Shapes:
        x: (B, ..., width) or (B, width, H, W); the result is the same.
    """

    def __init__(self, width: int, axis: int, eps: float) -> None:
        """Hold the settings; there are no weights."""
        super().__init__()
        self.width, self.axis, self.eps = width, axis, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised features."""
        return F.rms_norm(x.movedim(self.axis, -1), (self.width,), None, self.eps).movedim(-1, self.axis)


class Sum(nn.Module):
    """`a + b`."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sum."""
        return a + b


class Product(nn.Module):
    """`a * b`."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product."""
        return a * b
