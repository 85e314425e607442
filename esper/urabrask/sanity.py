"""Stage 1 of the gauntlet: is the kernel right? It runs in the sandboxed child, and in this order."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from esper.blueprints import Blueprint, SiteShape, load_library
from esper.blueprints.checks import check_blueprint
from esper.blueprints.manifest import BlueprintManifest
from esper.leyline.events import Rejection
from esper.urabrask.endurance import determinism, memory_kept
from esper.urabrask.findings import Failure
from esper.urabrask.guards import guards, parameters_moved, unrelated
from esper.urabrask.hazards import confined
from esper.urabrask.inputs import Subject
from esper.urabrask.numerics import (
    batches,
    finite_differences,
    frozen,
    gradients_agree,
    modes,
    threads,
    twice,
    upstream,
)
from esper.urabrask.trail import Trail
from esper.urabrask.trial import Complaint, Trial

Check = Callable[[Trial], Complaint | None]
"""Says what is wrong, or None."""

CHECKS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        "batches": batches,
        "gradients": gradients_agree,
        "finite differences": finite_differences,
        "train and eval": modes,
        "threads": threads,
        "frozen parameters": frozen,
        "gradients from above": upstream,
        "second gradients": twice,
        "bad samples": confined,
        "guards": guards,
        "moved parameters": parameters_moved,
        "unrelated results": unrelated,
        "determinism": determinism,
        "memory": memory_kept,
    }
)
"""Every check by name."""


class Sanity(NamedTuple):
    """What stage 1 found.

    Args:
        checks: names of the checks, in order.
        failures: those that were not passed.
        margin: largest difference seen, as a share of what is tolerated.
    """

    checks: tuple[str, ...]
    failures: tuple[Failure, ...]
    margin: float


def sanity(subject: Subject, trail: Trail) -> Sanity:
    """Put a kernel through every check; an eager one keeps its blueprint's contract too."""
    trial = Trial(subject, trail)
    found = [failure for name, check in CHECKS.items() if (failure := _run(name, check, trial))]
    names = tuple(CHECKS)
    if subject.manifest.pipeline == "fast":
        names = (*names, "blueprint")
        failure = _run("blueprint", _keeps_contract, trial)
        found += [failure] if failure else []
    return Sanity(names, tuple(found), trial.margin)


def _run(name: str, check: Check, trial: Trial) -> Failure | None:
    trial.trail.enter(name)
    try:
        complaint = check(trial)
    except Exception as error:  # A kernel may raise anything; whatever it is, it has failed.
        said = str(error).partition("\n")[0][:300]
        complaint = Complaint(f"it raises {type(error).__name__}: {said}", Rejection.SANITY_FAILED)
    if complaint is None:
        return None
    return Failure(check=name, detail=complaint.detail, recipe=trial.trail.recipe, rejection=complaint.rejection)


def _keeps_contract(trial: Trial) -> Complaint | None:
    """The shipped checker of blueprints, at the kernel's very place."""
    ir, spec = trial.subject.ir, trial.subject.manifest.spec
    known = next((blueprint for blueprint in load_library() if blueprint.ir.nodes == ir.nodes), None)
    manifest = BlueprintManifest(
        summary=ir.full_name,
        family="unknown",
        benefit_prior=(0.0, 0.0),
        risk_score=0.5,
        expected_latency_ms=1.0,
        requires_capability=ir.requires,
        mergeable=ir.mergeable,
        is_safe_action=False,
        causal=known is not None and known.manifest.causal,
    )
    try:
        check_blueprint(Blueprint(ir, manifest), SiteShape(spec.layout, spec.d_in, spec.d_out, spec.tokens, spec.kind))
    except AssertionError as error:
        return Complaint(str(error))
    return None
