"""Checks of stage 1 that hold a kernel's numbers against those of its eager module."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from esper.leyline.events import Rejection
from esper.urabrask.findings import Recipe
from esper.urabrask.inputs import gradients, make, step
from esper.urabrask.trial import Complaint, Trial

_BATCHES: Final = (1, 2, 3, 5, 8, 17)
_LARGE: Final = 64
_MOST_NUMBERS: Final = 1 << 21
_SEEDS: Final = (11, 12, 13)
_SCALES: Final = (1e-4, 30.0, 1e4)
_PROBES: Final = 3
_THREADS: Final = (2, 3)
_RACES: Final = 4
_NUDGES: Final = (1e-6, 1e-5, 1e-4, 1e-3)
_QUOTIENT: Final = 1e-3


def batches(trial: Trial) -> Complaint | None:
    """Shapes, precision, finite numbers and gradients for one sample, two, odd numbers of them, and many."""
    per_sample = torch.Size(trial.subject.shape(1)).numel()
    large = max(1, min(_LARGE, _MOST_NUMBERS // per_sample))
    return _first(trial, (trial.subject.recipe(batch, seed=batch) for batch in (*_BATCHES, large)))


def gradients_agree(trial: Trial) -> Complaint | None:
    """Every gradient for several seeds, and for numbers far from 1."""
    usual = [trial.subject.recipe(4, seed) for seed in _SEEDS]
    scaled = [usual[0].model_copy(update={"scale": scale}) for scale in _SCALES]
    denormal = usual[0].model_copy(update={"scale": 1e-40})
    zeros = usual[0].model_copy(update={"kind": "zeros"})
    return _first(trial, (*usual, *scaled, denormal, zeros))


def modes(trial: Trial) -> Complaint | None:
    """The same in training and evaluation mode, as far as it is for the eager module."""
    with _evaluating(trial):
        return trial.compare(trial.subject.recipe(3, seed=21))


def threads(trial: Trial) -> Complaint | None:
    """The same with several threads, as training has them; a race shows in some of the calls only."""
    before = torch.get_num_threads()
    try:
        for count in _THREADS:
            torch.set_num_threads(count)
            for call in range(_RACES):
                complaint = trial.compare(trial.subject.recipe(8, seed=25 + 2 * call))
                if complaint:
                    return complaint._replace(detail=f"with {count} threads, {complaint.detail}")
        return None
    finally:
        torch.set_num_threads(before)


def frozen(trial: Trial) -> Complaint | None:
    """Parameters, or the input, that want no gradient get none, and the others are still right."""
    recipe = trial.subject.recipe(2, seed=31)
    for keep in ("input only", "every other parameter", "parameters only", "nothing"):
        x, gradient = trial.give(recipe), trial.gradient(recipe)
        found, eager, exact = (
            _partly(child, given, upstream, keep)
            for child, given, upstream in (
                (trial.subject.child, x, gradient),
                (trial.subject.eager, x, gradient),
                (trial.subject.exact, x.double(), gradient.double()),
            )
        )
        if found.keys() != eager.keys():
            return Complaint(f"with gradients for {keep}, it returns {sorted(found)}, not {sorted(eager)}", _MISMATCH)
        complaint = trial.apart(found, eager, exact)
        if complaint:
            return complaint._replace(detail=f"with gradients for {keep}, {complaint.detail}")
    return None


def upstream(trial: Trial) -> Complaint | None:
    """Gradients from above that are no plain memory: one number spread out, one sample repeated, axes swapped."""
    recipe = trial.subject.recipe(4, seed=41)
    x, plain = trial.give(recipe), trial.gradient(recipe)
    views = (
        plain.flatten()[:1].view([1] * plain.ndim).expand(plain.shape),
        plain[:1].expand(plain.shape),
        plain.transpose(0, -1).contiguous().transpose(0, -1),
        torch.zeros_like(plain),
    )
    for view in views:
        found, eager = step(trial.subject.child, x, view), step(trial.subject.eager, x, view)
        complaint = trial.apart(found, eager, step(trial.subject.exact, x.double(), view.double()))
        if complaint:
            return complaint._replace(detail=f"with a gradient of strides {view.stride()}, {complaint.detail}")
    return None


def finite_differences(trial: Trial) -> Complaint | None:
    """The kernel's gradients against difference quotients of the eager module in double precision.

    `(f(p + h v) - f(p - h v)) / 2h` along random directions `v` of input and parameters together, in evaluation, where
    no state changes between two calls. A small `h` seldom meets a kink or the border between two experts; a large one
    drowns the rounding of what modules compute in single precision whatever they are given. A gradient that is wrong
    agrees with none. Modules whose gradient is not the derivative, by design, say so (`straight_through`).
    """
    if any(getattr(module, "straight_through", False) for module in trial.subject.exact.modules()):
        return None
    with _evaluating(trial):
        return _quotients_agree(trial)


def _quotients_agree(trial: Trial) -> Complaint | None:
    for probe in range(_PROBES):
        recipe = trial.subject.recipe(2, seed=51 + 2 * probe)
        x, gradient = trial.give(recipe), trial.gradient(recipe)
        found = step(trial.subject.child, x, gradient)
        along = {name: _direction(tensor, probe) for name, tensor in found.items() if name != "result"}
        claimed = sum(float((found[name].double() * direction).sum()) for name, direction in along.items())
        quotients = [_quotient(trial, x, gradient, along, nudge) for nudge in _NUDGES]
        # Terms of either sign may cancel in the sum, so the scale is that of the terms.
        scale = sum(float((found[name].double() * d).norm()) for name, d in along.items())
        allowed = max(_QUOTIENT, trial.tolerance) * max(scale, 1e-6)
        if not any(abs(claimed - quotient) <= allowed for quotient in quotients):
            told = " or ".join(f"{quotient:.6g}" for quotient in quotients)
            return Complaint(f"its gradient along a direction is {claimed:.6g}, the quotient {told}", _MISMATCH)
    return None


def twice(trial: Trial) -> Complaint | None:
    """The gradient of a gradient, where the eager module has one."""
    recipe = trial.subject.recipe(2, seed=61)
    x, gradient = trial.give(recipe), trial.gradient(recipe)
    try:
        eager = _second(trial.subject.eager, x, gradient)
    except RuntimeError:  # Some of torch's operations can be differentiated once only.
        return None
    found = _second(trial.subject.child, x, gradient)
    return trial.apart(found, eager, _second(trial.subject.exact, x.double(), gradient.double()))


_MISMATCH: Final = Rejection.GRADIENT_MISMATCH


@contextmanager
def _evaluating(trial: Trial) -> Iterator[None]:
    children = (trial.subject.child, trial.subject.eager, trial.subject.exact)
    try:
        for child in children:
            child.eval()
        yield
    finally:
        for child in children:
            child.train()


def _first(trial: Trial, recipes: Iterator[Recipe] | tuple[Recipe, ...]) -> Complaint | None:
    return next((complaint for recipe in recipes if (complaint := trial.compare(recipe))), None)


def _partly(child: torch.nn.Module, x: Tensor, gradient: Tensor, keep: str) -> dict[str, Tensor]:
    """Return result and gradients with some of them wanted; the parameters are as before afterwards."""
    before = {name: p.requires_grad for name, p in child.named_parameters()}
    wanted = {name: keep.endswith("only") is keep.startswith("parameters") for name in before}
    if keep == "every other parameter":
        wanted = {name: place % 2 == 0 for place, name in enumerate(before)}
    try:
        for name, parameter in child.named_parameters():
            parameter.requires_grad_(before[name] and wanted[name] and keep != "nothing")
        x = x.detach().requires_grad_(keep == "input only")
        result = child(x)
        given = {"input": x, **dict(child.named_parameters())}
        needed = {name: tensor for name, tensor in given.items() if tensor.requires_grad}
        found = gradients(result, list(needed.values()), gradient)
        return {"result": result.detach(), **{f"gradient of {n}": g for n, g in zip(needed, found, strict=True)}}
    finally:
        for name, parameter in child.named_parameters():
            parameter.requires_grad_(before[name])


def _direction(like: Tensor, probe: int) -> Tensor:
    return make(Recipe(shape=tuple(like.shape), seed=101 + probe)).double().div(like.numel() ** 0.5)


def _quotient(trial: Trial, x: Tensor, gradient: Tensor, along: Mapping[str, Tensor], nudge: float) -> float:
    above, below = (_value(trial, x, gradient, along, sign * nudge) for sign in (1, -1))
    return (above - below) / 2 / nudge


def _value(trial: Trial, x: Tensor, gradient: Tensor, along: Mapping[str, Tensor], nudge: float) -> float:
    """Return the number whose gradient is asked for, a nudge away along a direction."""
    exact = trial.subject.exact
    moved = {
        name: p + nudge * along[key] if (key := f"gradient of {name}") in along else p
        for name, p in exact.named_parameters()
    }
    with torch.no_grad():
        result = torch.func.functional_call(exact, moved, (x.double() + nudge * along["gradient of input"],))
    return float((result * gradient.double()).sum())


def _second(child: torch.nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    wanted = [x, *(p for p in child.parameters() if p.requires_grad)]
    first = torch.autograd.grad(child(x), wanted, gradient, create_graph=True, materialize_grads=True)
    total = torch.stack([g.square().sum() for g in first]).sum()
    found = gradients(total, wanted, torch.ones_like(total))
    return {f"second gradient {place}": g for place, g in enumerate(found)}
