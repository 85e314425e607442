"""Checks of stage 1 with one bad sample in a batch: the others must not notice."""

from typing import Final

import torch
from torch import Tensor

from esper.urabrask.findings import Kind, Recipe
from esper.urabrask.inputs import make
from esper.urabrask.trial import Complaint, Trial

_KINDS: Final[tuple[Kind, ...]] = ("nan", "inf", "extreme")
_BATCH: Final = 5


def confined(trial: Trial) -> Complaint | None:
    """NaN, infinities and 1e30 stay in their sample, and the first two are not hidden there."""
    for kind in _KINDS:
        for spoiled in (0, 2, _BATCH - 1):
            usual = trial.subject.recipe(_BATCH, seed=401)
            complaint = _confined(trial, usual.model_copy(update={"kind": kind, "spoiled": spoiled}))
            if complaint:
                return complaint
    return None


def _confined(trial: Trial, recipe: Recipe) -> Complaint | None:
    good = [sample for sample in range(_BATCH) if sample != recipe.spoiled]
    x = trial.give(recipe)
    clean = make(recipe.model_copy(update={"kind": "normal", "spoiled": -1}))
    found, eager = (_samples(child, x) for child in (trial.subject.child, trial.subject.eager))
    unspoilt = _samples(trial.subject.eager, clean)
    for name in found:
        complaint = trial.apart({name: found[name][good]}, {name: eager[name][good]}, {name: unspoilt[name][good]})
        if complaint:
            return complaint._replace(detail=f"sample {recipe.spoiled} spoils others: {complaint.detail}")
    # 1e30 squared is too much or not, in the order in which one computes; NaN and infinities are what they are.
    hidden = recipe.kind != "extreme" and bool(found["result"][recipe.spoiled].isfinite().all())
    if hidden and not bool(eager["result"][recipe.spoiled].isfinite().all()):
        return Complaint(f"a sample of {recipe.kind} has a finite result; the eager module shows what it was given")
    return None


def _samples(child: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return result and gradient of the input; parameters' gradients mix all samples."""
    x = x.detach().requires_grad_()
    result = child(x)
    (gradient,) = torch.autograd.grad(result, [x], torch.ones_like(result), materialize_grads=True)
    return {"result": result.detach(), "gradient of input": gradient}
