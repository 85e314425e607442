"""Operations that watch or guard what passes: statistics, a bound on gradients, norms over every rank's data."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch import distributed as dist

from esper.blueprints.op import Op, Value
from esper.blueprints.site import Layout
from esper.blueprints.state import StatefulModule

_FADE = 0.99
"""Share of a statistic that a forward pass leaves as it was."""


class Tap(Op):
    """Statistics of each feature in training; the result is zero and has no gradient."""

    SILENT: ClassVar[bool] = True

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `Meter`."""
        return Meter(inputs[0].width, _axis(inputs[0].layout), device)


class ClampGradient(Op):
    """The input as it is; backwards no sample's gradient is longer than `times` the median of its batch.

    The bound follows the gradients, so it needs no tuning, and a loss scaled for half precision changes nothing.

    Args:
        times: the bound, in medians; default 4.
    """

    IDENTITY: ClassVar[bool] = True
    times: float = Field(default=4.0, gt=0, le=1e6)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `GradientGuard`."""
        return GradientGuard(self.times)


class SharedNorm(Op):
    """Mean 0 and variance 1 of each feature over the data of every rank, by running means.

    Each rank measures its own shard of the batch; one all-reduce of two numbers for each feature joins them. The next
    pass uses them, so a sample's result does not depend on its batch, and evaluation computes what training did.
    """

    REQUIRES: ClassVar[tuple[str, ...]] = ("process_group",)

    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return a `RunningNorm`."""
        return RunningNorm(inputs[0].width, _axis(inputs[0].layout), device)


def _axis(layout: Layout) -> int:
    return 1 if layout == "bchw" else -1


def _by_feature(x: Tensor, axis: int) -> Tensor:
    """Return the numbers of each feature in a row, in single precision: (features, everything else)."""
    return x.detach().float().movedim(axis, 0).flatten(1)


class Meter(StatefulModule):
    """Keeps fading means of a feature's statistics, and returns a negative zero, which changes no bit of a sum.

    Args:
        width: number of features.
        axis: the feature axis, -1 or 1.
        device: where the statistics live.

    Shapes:
        x: (B, ..., width) or (B, width, H, W); the result is the same.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("mean", "std", "minimum", "maximum", "zero_share")
    statistics: Tensor
    weight_seen: Tensor

    def __init__(self, width: int, axis: int, device: str) -> None:
        """Start with nothing seen."""
        super().__init__()
        self.axis = axis
        self.register_buffer("statistics", torch.zeros(len(self.NAMES), width, device=device))
        self.register_buffer("weight_seen", torch.zeros((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return a zero."""
        if self.observes() and x.numel():
            self._take(x)
        return torch.neg(torch.zeros_like(x))

    @torch.no_grad()
    def _take(self, x: Tensor) -> None:
        rows = _by_feature(x, self.axis)
        low, high = torch.aminmax(rows, dim=1)
        now = torch.stack((rows.mean(1), rows.square().mean(1), low, high, (rows == 0).float().mean(1)))
        self.statistics.lerp_(now, 1 - _FADE)
        self.weight_seen.lerp_(torch.ones_like(self.weight_seen), 1 - _FADE)

    def readings(self) -> dict[str, Tensor]:
        """Return mean, standard deviation, mean extremes of a batch, and share of exact zeros, for each feature.

        Each is a mean over the forward passes in training, the last hundred counting most; NaN before the first.
        """
        found = dict(zip(self.NAMES, self.statistics / self.weight_seen, strict=True))
        return found | {"std": (found["std"] - found["mean"].square()).clamp_min(0).sqrt()}


class _Guarded(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, times: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.times = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        norms = gradient.float().flatten(1).norm(dim=1)
        # A sample without a gradient says nothing of how long one should be.
        usual = norms.where(norms > 0, torch.nan).nanmedian().nan_to_num(0.0)
        scale = (ctx.times * usual / norms.clamp_min(1e-30)).clamp_max(1.0)
        return gradient * scale.to(gradient.dtype).view(-1, *(1,) * (gradient.dim() - 1)), None


class GradientGuard(nn.Module):
    """Bounds the gradient of each sample in training.

    Args:
        times: the bound, in medians of the batch.

    Shapes:
        x: (B, ...); the result is the same.
    """

    def __init__(self, times: float) -> None:
        """Hold the bound; there are no weights."""
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        if not self.training:
            return x
        result: Tensor = _Guarded.apply(x, self.times)  # type: ignore[no-untyped-call]
        return result


class RunningNorm(StatefulModule):
    """Normalises features by running means that are the same on every rank.

    Args:
        width: number of features.
        axis: the feature axis, -1 or 1.
        device: where the means live.

    Shapes:
        x: (B, ..., width) or (B, width, H, W); the result is the same.
    """

    moments: Tensor
    recent: Tensor

    def __init__(self, width: int, axis: int, device: str) -> None:
        """Start from mean 0 and mean square 1."""
        super().__init__()
        self.shape = (width, 1, 1) if axis == 1 else (width,)
        self.axis = axis
        start = torch.stack((torch.zeros(width, device=device), torch.ones(width, device=device)))
        self.register_buffer("moments", start)
        self.register_buffer("recent", start.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised features."""
        if self.observes():
            self.moments.lerp_(self.recent, 1 - _FADE)
        mean, square = self.moments.unbind()
        scale = torch.rsqrt((square - mean.square()).clamp_min(1e-5))
        result = (x.float() - mean.view(self.shape)) * scale.view(self.shape)
        if self.observes():
            self._measure(x)
        return result.to(x.dtype)

    @torch.no_grad()
    def _measure(self, x: Tensor) -> None:
        """Join the moments of this rank's shard with those of the others; collective."""
        rows = _by_feature(x, self.axis)
        found = torch.stack((rows.mean(1), rows.square().mean(1))) if x.numel() else self.moments.clone()
        dist.all_reduce(found)
        self.recent.copy_(found / dist.get_world_size())


def readings(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return what every meter inside a module has read, by its path.

    Args:
        module: a child, a grown model, or a part of one.

    Example:
        >>> from esper.blueprints import SiteShape, build, load_library
        >>> child = build(load_library()["BP-MON-ACT-STATS"].ir, SiteShape("bd", 2, 2), seed=0)
        >>> _ = child(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> {name: value.tolist() for name, value in readings(child)["tap"].items() if name in ("mean", "zero_share")}
        {'mean': [2.0, 0.0], 'zero_share': [0.0, 1.0]}
    """
    return {path: part.readings() for path, part in module.named_modules() if isinstance(part, Meter)}
