"""One child in one slot: how it reads, how it is blended in, and what happens when it fails.

Shapes: x is the site's input and y its output; D is the chunk's width along the feature dimension.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.leyline.errors import KernelError
from esper.leyline.events import Fault

Objective = Literal["graft", "shadow", "reconstruction"]


class _Misbehaved(KernelError):
    """A child broke its contract in a forward."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.kind = fault.value


class Graft(nn.Module):
    """A child network, its alpha, and its way into the host's activation.

    The blend is `y + alpha * r`. The residual `r` is what the child returns when its graph computes a residual,
    and `child(y) - y` when its graph computes a replacement.

    In `shadow` training the graft adds `r - r.detach()`: the sum is zero, so the forward pass and every gradient of
    the host are those of the bare model, while the child gets the true gradient of the task.
    In `reconstruction` training the graft adds nothing; the child learns to restore hidden features of y.

    Args:
        child: network from the blueprint.
        reads: `output` (serial) or `input` (parallel).
        replaces: whether the child computes a replacement instead of a residual.
        start: first feature of the chunk.
        width: width D of the chunk; None for the whole layer.
    """

    alpha: Tensor
    reference: Tensor | None

    def __init__(
        self, child: nn.Module, *, reads: str, replaces: bool, start: int = 0, width: int | None = None
    ) -> None:
        """Start as a shadow, at alpha 0."""
        super().__init__()
        self.child = child
        self.reads, self.replaces, self.start, self.width = reads, replaces, start, width
        self.objective: Objective = "shadow"
        self.norm_bound = 1.0
        self.noise = 0.2
        self.fault: str | None = None
        self.fault_kind = ""
        self.fault_reported = False
        self.muted = False
        self.strength = 0.0
        self.pending: Tensor | None = None
        self.register_buffer("alpha", torch.zeros(()))
        self.register_buffer("reference", None)

    @property
    def live(self) -> bool:
        """Whether the forward hook has anything to do for this graft."""
        return self.fault is None and not self.muted and (self.objective != "graft" or self.strength > 0)

    def set_alpha(self, value: float) -> None:
        """Set alpha in [0, 1]; a 0-dim buffer, so that compiled hosts need no recompilation."""
        self.strength = value
        self.alpha.fill_(value)

    def remember_host(self, site: nn.Module) -> None:
        """Keep the site's present weights, to measure its drift from here on."""
        self.register_buffer("reference", _flat(site))

    def drift(self, site: nn.Module) -> float:
        """Return `|w - w0| / |w0|` of the site's weights since `remember_host`; 0 for a site without weights."""
        if self.reference is None or self.reference.numel() == 0:
            return 0.0
        return float((_flat(site) - self.reference).norm() / self.reference.norm().clamp_min(1e-12))

    def grad_norm(self) -> float:
        """Return the Euclidean norm of the child's gradients."""
        grads = [p.grad.detach().norm() for p in self.child.parameters() if p.grad is not None]
        return float(torch.stack(grads).norm()) if grads else 0.0

    def contribution(self, x: Tensor | None, y: Tensor, dim: int) -> Tensor | None:
        """Return what to add to the chunk of `y` along `dim`, or None; never raises for a fault of the child."""
        part = y if self.width is None else y.narrow(dim, self.start, self.width)
        if self.objective == "reconstruction":
            self._reconstruct(x, part)
            return None
        shadow = self.objective == "shadow"
        residual = self._guarded(x, part, detach=shadow)
        if residual is None:
            return None
        return self._shadowed(residual, part, dim) if shadow else self.alpha.to(residual.dtype) * residual

    def _shadowed(self, residual: Tensor, part: Tensor, dim: int) -> Tensor:
        with torch.no_grad():
            limit = self.norm_bound * part.norm(dim=dim, keepdim=True)
            scale = (limit / residual.norm(dim=dim, keepdim=True).clamp_min(1e-12)).clamp(max=1.0)
        bounded = residual * scale
        return bounded - bounded.detach()

    def _reconstruct(self, x: Tensor | None, part: Tensor) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        target = part.detach()
        hidden = torch.rand(target.shape, generator=self._generator(target), device=target.device) < self.noise
        corrupted = target.masked_fill(hidden, 0.0)
        residual = self._guarded(x, corrupted, detach=True)
        if residual is not None:
            self.pending = F.mse_loss(corrupted + residual, target)

    def _generator(self, like: Tensor) -> torch.Generator:
        # The mask must not draw from the global stream, or the host's own run would change.
        return torch.Generator(device=like.device).manual_seed(like.numel())

    def _guarded(self, x: Tensor | None, part: Tensor, *, detach: bool) -> Tensor | None:
        try:
            return self._residual(x, part, detach=detach)
        except _Misbehaved as error:
            self.fault, self.fault_kind = str(error), error.kind
        except Exception as error:  # whatever the kernel raises, the host must go on
            self.fault, self.fault_kind = f"{type(error).__name__}: {error}", Fault.RAISED.value
        return None

    def _residual(self, x: Tensor | None, part: Tensor, *, detach: bool) -> Tensor:
        source = part if self.reads == "output" else x
        if source is None:
            raise _Misbehaved(Fault.RAISED, "the child reads the site's input, but there is no float tensor in it")
        result = self.child(source.detach() if detach else source)
        if not isinstance(result, Tensor) or result.shape != part.shape:
            given = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise _Misbehaved(Fault.WRONG_SHAPE, f"the child returned {given}; the site needs a tensor of shape {tuple(part.shape)}")
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(result).all()):
            raise _Misbehaved(Fault.NOT_FINITE, "the child returned a non-finite value")
        result = result.to(part.dtype)
        return result - (part.detach() if detach else part) if self.replaces else result


def _flat(module: nn.Module) -> Tensor:
    parts = [p.detach().flatten().float() for p in module.parameters()]
    return torch.cat(parts) if parts else torch.zeros(0)
