"""One kernel on trial: every input is written down before it is tried, every output is held against two others."""

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, final

import torch
from torch import Tensor

from esper.leyline.events import Rejection
from esper.urabrask.findings import Recipe
from esper.urabrask.inputs import Subject, make, step
from esper.urabrask.trail import Trail

TOLERANCE: Final = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference from the eager module, relative to the norm of each tensor, by precision."""

_EAGER_ERRORS: Final = 4.0
"""A kernel may be this much further from double precision than its eager module is."""

_NEGLIGIBLE: Final = 1e-2
"""Where the true gradient is zero, rounding is measured against this share of the largest tensor's tolerance."""

_CANARY: Final = 64


class Complaint(NamedTuple):
    """What is wrong with a kernel, and what this means for it."""

    detail: str
    rejection: Rejection = Rejection.SANITY_FAILED


@final
class Trial:
    """What a check works with.

    Args:
        subject: the kernel.
        trail: where inputs are written down.
    """

    def __init__(self, subject: Subject, trail: Trail) -> None:
        """Begin with nothing tried."""
        self.subject, self.trail = subject, trail
        self.margin = 0.0
        self.tolerance = TOLERANCE[subject.manifest.spec.dtype]

    def give(self, recipe: Recipe) -> Tensor:
        """Return the input of a recipe, after writing it down."""
        self.trail.give(recipe)
        return make(recipe)

    def gradient(self, recipe: Recipe) -> Tensor:
        """Return the gradient that a recipe's result is given: random numbers of the next seed."""
        site, shape = self.subject.eager.site, list(recipe.shape)
        shape[1 if site.layout == "bchw" else -1] = site.d_out
        return make(Recipe(shape=tuple(shape), dtype=recipe.dtype, seed=recipe.seed + 1))

    def compare(self, recipe: Recipe) -> Complaint | None:
        """Run kernel, eager module and double precision forward and backward on one input; say how they differ."""
        x, gradient = self.give(recipe), self.gradient(recipe)
        eager = step(self.subject.eager, x, gradient)
        found, broken = self.watched(lambda given: step(self.subject.child, given, gradient), x)
        if broken:
            return broken
        return self.apart(found, eager, step(self.subject.exact, x.double(), gradient.double()))

    def watched(
        self, run: Callable[[Tensor], dict[str, Tensor]], x: Tensor
    ) -> tuple[dict[str, Tensor], Complaint | None]:
        """Run a function on an input; complain if it writes to the input, around it, or to a parameter."""
        parameters = [p.detach().clone() for p in self.subject.child.parameters()]
        # One number off its natural place: training hands in views too, and a vector instruction may mind.
        memory = torch.full((2 * _CANARY + 1 + x.numel(),), 7.0, dtype=x.dtype)
        given = memory[_CANARY + 1 : _CANARY + 1 + x.numel()].view(x.shape).copy_(x)
        before = memory.clone()
        found = run(given)
        if not _same(memory, before):
            return found, Complaint("it writes to its input, or to the memory around it")
        now = self.subject.child.parameters()
        if not all(_same(p.detach(), old) for p, old in zip(now, parameters, strict=True)):
            return found, Complaint("it writes to its parameters")
        return found, None

    def apart(
        self,
        found: Mapping[str, Tensor],
        eager: Mapping[str, Tensor],
        exact: Mapping[str, Tensor],
        tolerance: float | None = None,
    ) -> Complaint | None:
        """Complain of the first output that is neither as close to double precision nor to the eager one as it must be.

        `error <= tolerance * norm + 4 * eager error`, for each tensor, in the 2-norm.
        """
        tolerance = tolerance or self.tolerance
        floor = _NEGLIGIBLE * tolerance * max(float(tensor.norm()) for tensor in exact.values())
        for name, true in exact.items():
            one, other = found[name], eager[name]
            if one.shape != other.shape or one.dtype is not other.dtype:
                return Complaint(f"{name} is {_sort(one)}; the eager module returns {_sort(other)}")
            if not bool(other.isfinite().all()):
                continue  # The input is too much for this precision, whoever computes.
            if not bool(one.isfinite().all()):
                return Complaint(f"{name} is not finite where the eager module's is")
            one, other, true = one.double(), other.double(), true.double()
            noise = float((other - true).norm())
            allowed = tolerance * float(true.norm()) + _EAGER_ERRORS * noise + floor
            error = min(float((one - true).norm()), float((one - other).norm()))
            if error > allowed:
                kind = Rejection.SANITY_FAILED if name == "result" else Rejection.GRADIENT_MISMATCH
                share = error / max(float(true.norm()), 1e-30)
                return Complaint(f"{name} differs from the eager module's by {share:.2e}, relative", kind)
            self.margin = max(self.margin, error / max(allowed, 1e-30))
        return None


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """Return the name of the first output that is not bit-equal; empty where all are."""
    return next((name for name in one if not _same(one[name], other[name])), "")


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits; NaN equals NaN."""
    bits = (tensor.contiguous().view(torch.uint8) for tensor in (one, other))
    return one.shape == other.shape and torch.equal(*bits)


def _sort(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
