"""Checks of stage 1 with inputs that a kernel was not compiled for: it must do what its eager module does."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Final, NamedTuple

import torch
from torch import Tensor

from esper.blueprints.build import Child
from esper.urabrask.findings import Recipe
from esper.urabrask.inputs import step
from esper.urabrask.trial import Complaint, Trial, equal

_COARSE: Final = 2e-2
"""Tolerance where bfloat16 takes part."""

_REFUSALS: Final = (RuntimeError, ValueError, TypeError, IndexError)
"""What a module raises for an input that it cannot take."""


class _Case(NamedTuple):
    """A way to call a child, for which it was not compiled or which is easily forgotten."""

    name: str
    recipe: Recipe
    change: Callable[[Tensor], Tensor] = lambda x: x
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    coarse: bool = False


def guards(trial: Trial) -> Complaint | None:
    """Other precisions, autocast, other sizes, views, no samples: the eager path, or right all the same."""
    for case in _cases(trial):
        x = case.change(trial.give(case.recipe))
        found, eager = (_outcome(child, x, case) for child in (trial.subject.child, trial.subject.eager))
        if isinstance(found, str) or isinstance(eager, str):
            if isinstance(found, str) is not isinstance(eager, str):
                return Complaint(f"{case.name}: the kernel {_told(found)}, the eager module {_told(eager)}")
            continue
        complaint = trial.apart(found, eager, eager, _COARSE if case.coarse else None)
        if complaint:
            return complaint._replace(detail=f"{case.name}: {complaint.detail}")
    return None


def parameters_moved(trial: Trial) -> Complaint | None:
    """Parameters that are no plain memory, and parameters lent for one call."""
    child, eager = trial.subject.child, trial.subject.eager
    recipe = trial.subject.recipe(2, seed=71)
    x, gradient = trial.give(recipe), trial.gradient(recipe)
    lent = {name: 0.5 * p.detach() for name, p in child.named_parameters()}
    one, other = ({"result": torch.func.functional_call(module, lent, (x,)).detach()} for module in (child, eager))
    complaint = trial.apart(one, other, other)
    if complaint:
        return complaint._replace(detail=f"with lent parameters, {complaint.detail}")
    before = [p.data for p in child.parameters()]
    try:
        for parameter in child.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1)
        found, wanted = step(child, x, gradient), step(eager, x, gradient)
        return trial.apart(found, wanted, wanted)
    finally:
        for parameter, data in zip(child.parameters(), before, strict=True):
            parameter.data = data


def unrelated(trial: Trial) -> Complaint | None:
    """A result is memory of its own: neither the next call nor somebody who writes to it changes another's numbers."""
    child, eager = trial.subject.child, trial.subject.eager
    first, second = trial.subject.recipe(2, seed=81), trial.subject.recipe(2, seed=83)
    x, gradient = trial.give(first), trial.gradient(first)
    found = step(child, x, gradient)
    kept = {name: tensor.clone() for name, tensor in found.items()}
    step(child, trial.give(second), gradient)
    changed = equal(found, kept)
    if changed:
        return Complaint(f"{changed} changes when the kernel is called again")
    wanted = _doubled(eager, x, gradient)
    written = _doubled(child, x, gradient)
    # A module may refuse the backward because its result was written to; to go on with wrong numbers is worse.
    if isinstance(written, dict) and isinstance(wanted, dict):
        return trial.apart(written, wanted, wanted)
    return None


def _cases(trial: Trial) -> Iterator[_Case]:
    usual = trial.subject.recipe(4, seed=91)
    other = "float32" if usual.dtype == "bfloat16" else "bfloat16"
    yield _Case(f"{other} input", usual.model_copy(update={"dtype": other}), coarse=True)
    yield _Case("float64 input", usual.model_copy(update={"dtype": "float64"}), coarse=usual.dtype == "bfloat16")
    yield _Case("autocast", usual, within=lambda: torch.autocast("cpu", torch.bfloat16), coarse=True)
    yield _Case("no_grad", usual, within=torch.no_grad)
    yield _Case("inference_mode", usual, within=torch.inference_mode)
    yield _Case("no samples", trial.subject.recipe(0))
    yield _Case("axes swapped in memory", usual, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))
    yield _Case("every other sample", usual, lambda x: x[::2])
    yield _Case("one sample repeated", usual, lambda x: x[:1].expand(x.shape))
    yield _Case("another width", usual.model_copy(update={"shape": (*usual.shape[:-1], usual.shape[-1] + 1)}))
    if len(usual.shape) > 2:
        for size in (usual.shape[-2] + 1, max(1, usual.shape[-2] // 2)):
            shape = (*usual.shape[:-2], size, usual.shape[-1])
            yield _Case("another length", usual.model_copy(update={"shape": shape}))
        yield _Case("an axis more", usual.model_copy(update={"shape": (1, *usual.shape)}))
    if len(usual.shape) == 4:
        yield _Case("channels last", usual, lambda x: x.contiguous(memory_format=torch.channels_last))


def _outcome(child: Child, x: Tensor, case: _Case) -> dict[str, Tensor] | str:
    """Return result and gradients, or what was raised."""
    try:
        with case.within():
            if not torch.is_grad_enabled():
                return {"result": child(x)}
            x = x.detach().requires_grad_()
            result = child(x)
        wanted = [x, *(p for p in child.parameters() if p.requires_grad)]
        found = torch.autograd.grad(result, wanted, torch.ones_like(result), materialize_grads=True)
        return {"result": result.detach(), **{f"gradient {place}": g for place, g in enumerate(found)}}
    except _REFUSALS as error:
        return f"raises {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def _doubled(child: Child, x: Tensor, gradient: Tensor) -> dict[str, Tensor] | str:
    """Return the gradients after somebody has written to the result."""
    x = x.detach().requires_grad_()
    wanted = [x, *(p for p in child.parameters() if p.requires_grad)]
    try:
        result = child(x).mul_(2.0)
        found = torch.autograd.grad(result, wanted, gradient, materialize_grads=True)
    except RuntimeError as error:
        return str(error)
    return {f"gradient {place}": g for place, g in enumerate(found)}


def _told(outcome: dict[str, Tensor] | str) -> str:
    return outcome if isinstance(outcome, str) else "returns a result"
