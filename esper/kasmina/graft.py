"""One child in one slot: how it reads, how it is blended in, and what happens when it fails.

Shapes: x is the site's input and y its output; D is the chunk's width along the feature dimension.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.kasmina.blend import Addition
from esper.leyline.errors import KernelError
from esper.leyline.events import Fault

Objective = Literal["graft", "shadow", "reconstruction"]


class _Misbehaved(KernelError):
    """A child broke its contract in a forward."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.kind = fault


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
        self.sound: bool | None = None
        self.muted = False
        self.strength = 0.0
        self.pending: Tensor | None = None
        self.draws = 0
        self.register_buffer("alpha", torch.zeros(()))
        self.register_buffer("reference", None)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the pending loss out of copies and pickles: it holds an autograd graph."""
        return {**self.__dict__, "pending": None}

    @property
    def live(self) -> bool:
        """Whether the forward hook has anything to do for this graft."""
        return self.fault is None and not self.muted and (self.objective != "graft" or self.strength > 0)

    def set_alpha(self, value: float) -> None:
        """Set alpha in [0, 1]; a 0-dim buffer, saved with the state and on the device like any other."""
        self.strength = value
        self.alpha.fill_(value)

    def fail(self, kind: Fault, why: str) -> None:
        """Record a fault; from now on the child is bypassed."""
        self.fault, self.fault_kind = why, kind.value

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

    def screen_gradients(self) -> None:
        """Before an optimizer step: record a fault for non-finite gradients, and keep a faulty child's from it.

        The child is to blame only where every gradient that reached it was finite.
        """
        grads = [p.grad for p in self.child.parameters() if p.grad is not None]
        if self.fault is None and self.sound and not _all_finite(grads):
            self.fail(Fault.NOT_FINITE, "the child's backward pass gave its own weights a non-finite gradient")
        self.sound = None
        if self.fault is not None:
            self.child.zero_grad()

    def contribution(self, x: Tensor | None, y: Tensor, dim: int) -> Addition | None:
        """Return what to add to the chunk of `y` along `dim`, or None; never raises for a fault of the child."""
        if self.fault is not None:
            return None
        part = y if self.width is None else y.narrow(dim, self.start, self.width)
        if self.objective == "reconstruction":
            self._reconstruct(x, part)
            return None
        shadow = self.objective == "shadow"
        if shadow and not torch.is_grad_enabled():
            return None
        residual = self._guarded(x, part, detach=shadow)
        if residual is None:
            return None
        added, alpha = (self._shadowed(residual, part, dim), None) if shadow else (residual, self.alpha)
        return Addition(added, alpha, self.start, self.width)

    def _shadowed(self, residual: Tensor, part: Tensor, dim: int) -> Tensor:
        with torch.no_grad():
            limit = self.norm_bound * part.float().norm(dim=dim, keepdim=True)
            scale = (limit / residual.float().norm(dim=dim, keepdim=True).clamp_min(1e-12)).clamp(max=1.0)
        bounded = residual * scale.to(residual.dtype)
        # A negative zero: adding it leaves every bit, also that of another negative zero.
        return torch.neg(bounded.detach() - bounded)

    def _reconstruct(self, x: Tensor | None, part: Tensor) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        # A copy: the host may go on to change its activation in place.
        target = part.detach().clone()
        hidden = torch.rand(target.shape, generator=self._generator(target), device=target.device) < self.noise
        corrupted = target.masked_fill(hidden, 0.0)
        residual = self._guarded(x, corrupted, detach=True)
        if residual is not None:
            self.pending = F.mse_loss(corrupted + residual, target)

    def _generator(self, like: Tensor) -> torch.Generator:
        # The mask must not draw from the global stream, or the host's own run would change.
        self.draws += 1
        return torch.Generator(device=like.device).manual_seed(self.draws)

    def _guarded(self, x: Tensor | None, part: Tensor, *, detach: bool) -> Tensor | None:
        try:
            return self._residual(x, part, detach=detach)
        except _Misbehaved as error:
            self.fail(error.kind, str(error))
        except Exception as error:  # whatever the kernel raises, the host must go on
            self.fail(Fault.RAISED, f"{type(error).__name__}: {error}")
        return None

    def _residual(self, x: Tensor | None, part: Tensor, *, detach: bool) -> Tensor | None:
        source = part if self.reads == "output" else x
        if source is None:
            raise _Misbehaved(Fault.RAISED, "the child reads the site's input, but there is no float tensor in it")
        read = source.detach() if detach else self._screened(source)
        result = _checked(self.child(self._readable(read)), part).to(part.dtype)
        residual = result - (part.detach() if detach else part) if self.replaces else result
        if torch.compiler.is_exporting():
            return residual  # Traced without values: there is nothing to look at.
        if _finite(residual):
            if self._watches(residual):
                residual.register_hook(self._take_gradient)  # type: ignore[no-untyped-call]
            return residual
        if _finite(source) and _finite(part):
            raise _Misbehaved(Fault.NOT_FINITE, "the child returned a non-finite value")
        # The host itself went wrong: there is nothing to add and nobody to blame.
        return None

    def _screened(self, source: Tensor) -> Tensor:
        """Return an alias of what the child reads; only the gradient that comes back through the child passes it."""
        if torch.compiler.is_exporting() or not self._watches(source):
            return source
        alias = source.view_as(source)
        alias.register_hook(self._give_gradient)  # type: ignore[no-untyped-call]
        return alias

    def _watches(self, t: Tensor) -> bool:
        # A loss scaled for float16 overflows now and then, and the scaler then skips the step: nobody's fault.
        kind = t.device.type
        scaled = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
        return t.requires_grad and torch.is_grad_enabled() and not scaled

    def _take_gradient(self, grad: Tensor) -> None:
        self.sound = self.sound is not False and _finite(grad)

    def _give_gradient(self, grad: Tensor) -> Tensor | None:
        if not self.sound or _finite(grad):
            return None
        self.fail(Fault.NOT_FINITE, "the child's backward pass gave the host a non-finite gradient")
        return torch.zeros_like(grad)

    def _readable(self, source: Tensor) -> Tensor:
        """Cast to the child's own precision: a child may keep float32 weights beside a bfloat16 host."""
        own = next((p.dtype for p in self.child.parameters()), source.dtype)
        return source if torch.is_autocast_enabled(source.device.type) else source.to(own)


def _checked(result: object, part: Tensor) -> Tensor:
    if not isinstance(result, Tensor) or not result.is_floating_point():
        kind = f"a tensor of {result.dtype}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise _Misbehaved(Fault.WRONG_SHAPE, f"the child returned {kind}; the site needs a tensor of {part.dtype}")
    if result.shape != part.shape or result.device != part.device:
        given, needed = (f"{tuple(t.shape)} on {t.device}" for t in (result, part))
        raise _Misbehaved(Fault.WRONG_SHAPE, f"the child returned {given}; the site needs {needed}")
    return result


def _finite(t: Tensor) -> bool:
    return bool(torch.isfinite(t).all())


def _all_finite(tensors: list[Tensor]) -> bool:
    """Ask the device once for all."""
    return not tensors or bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())


def _flat(module: nn.Module) -> Tensor:
    parts = [_whole(p.detach()).flatten().float() for p in module.parameters()]
    return torch.cat(parts) if parts else torch.zeros(0)


def _whole(t: Tensor) -> Tensor:
    """Return a sharded tensor put together again; all ranks measure at the same time."""
    gather = getattr(t, "full_tensor", None)
    return gather() if gather is not None else t
