"""Checks of stage 1 that take many calls: the same again after a thousand others, and no memory kept."""

import ctypes
import gc
from typing import Final

import psutil
import torch

from esper.urabrask.inputs import step
from esper.urabrask.trial import Complaint, Trial, equal

CALLS: Final = 1200
"""Forwards with their backwards between the first call with an input and the last one."""

LEAK_MB: Final = 1.0
"""Growth of the process over 300 calls, in MiB, from which on memory counts as kept; it must grow so every time."""

_BATCHES: Final = (1, 2, 1, 3, 1, 1)
_WINDOW: Final = 300
_MEBIBYTE: Final = 2**20


def determinism(trial: Trial) -> Complaint | None:
    """The same input gives the same bits, at once and again during and after a thousand other calls."""
    recipes = [trial.subject.recipe(batch, seed=201 + 2 * item) for item, batch in enumerate(_BATCHES)]
    inputs = [(trial.give(recipe), trial.gradient(recipe)) for recipe in recipes]
    child = trial.subject.child
    first = []
    for recipe, (x, gradient) in zip(recipes, inputs, strict=True):
        trial.trail.give(recipe)
        # A kernel that draws random numbers must draw the same ones after the same seed.
        torch.manual_seed(recipe.seed)
        first.append(step(child, x, gradient))
    for call in range(CALLS):
        item = call % len(recipes)
        recipe = recipes[item].model_copy(update={"call": len(recipes) + call})
        trial.trail.give(recipe)
        torch.manual_seed(recipe.seed)
        found = step(child, *inputs[item])
        changed = equal(found, first[item])
        if changed:
            return Complaint(_change(changed, bool(found[changed].isfinite().all()), len(recipes) + call))
    return None


def memory_kept(trial: Trial) -> Complaint | None:
    """The process does not grow with the number of calls."""
    recipe = trial.subject.recipe(1, seed=301)
    x, gradient = trial.give(recipe), trial.gradient(recipe)
    grown = []
    for window in range(4):
        before = _resident_mb()
        for _ in range(_WINDOW):
            step(trial.subject.child, x, gradient)
        grown.append(_resident_mb() - before)
        if window > 0 and grown[-1] <= LEAK_MB:
            return None
    return Complaint(f"{_WINDOW} calls grow the process by {grown[-1]:.1f} MiB, again and again")


def _change(name: str, finite: bool, calls: int) -> str:
    what = "has other bits than before" if finite else "is not finite any more"
    return f"{name} of the same input {what} after {calls} calls"


def _resident_mb() -> float:
    """Return the size of the process without memory that is free inside it, where a leak would hide."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    resident: int = psutil.Process().memory_info().rss
    return resident / _MEBIBYTE
