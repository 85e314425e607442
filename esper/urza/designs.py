"""What happens to blueprints in the store: submitted, changed, carried along by their kernels."""

import hashlib
import json
from collections.abc import Mapping
from typing import Final, final

from esper.leyline.artifacts import Role
from esper.leyline.errors import BadHash, StoreError
from esper.leyline.kernels import ArtifactStatus, Blueprint
from esper.leyline.reports import FieldReport
from esper.leyline.states import Reason, SeedState
from esper.urza.canonical import canonical_text
from esper.urza.changes import Change, Core, check_step

FIELD: Final = "field"
"""Source of the interest that field reports feed."""

_WEIGHT: Final = 0.2
_TELLS_NOTHING: Final = frozenset({Reason.RUN_ENDED, Reason.USER_CANCELLED})
_S = ArtifactStatus
_AHEAD: Final = frozenset({_S.PENDING_BENCHMARKING, _S.VALIDATED})


@final
class Designs:
    """The blueprints of a store.

    Args:
        core: the store.
    """

    def __init__(self, core: Core) -> None:
        """Remember the store."""
        self._core = core
        self._table = core.records.blueprints

    def submit(self, blueprint: Blueprint, submitter: str) -> Blueprint:
        """Take a blueprint in; one that is there already stays as it is.

        Raises:
            BadHash: its id is not the SHA-256 of its canonical IR.
            StoreError: a parent is unknown, or the name and version are taken by another IR.
        """
        check_id(blueprint)
        with self._core.change() as change:
            known = self._table.get(blueprint.id)
            if known is not None:
                return known
            self._check_place(blueprint)
            fresh = blueprint.model_copy(update={"status": _S.UNVALIDATED, "kernels": ()})
            self._table.set(fresh.id, fresh)
            self._core.records.set_text(_version(fresh), fresh.id)
            change.note(Role.KARN, "submit", fresh.id, after=fresh.status, detail=f"{fresh.name} by {submitter or '?'}")
        return fresh

    def update(
        self,
        blueprint_id: str,
        status: ArtifactStatus | None,
        interest: Mapping[str, float],
        detail: str,
        role: Role,
    ) -> Blueprint:
        """Change a blueprint's status, interest or reason.

        Raises:
            IllegalTransition: the status may not follow the present one.
            StoreError: there is no such blueprint, or VALIDATED is asked for without a VALIDATED kernel.
        """
        with self._core.change() as change:
            blueprint = self._table.need(blueprint_id)
            if interest:
                blueprint = _interested(blueprint, interest)
                change.note(role, "interest", blueprint_id, detail=json.dumps(dict(interest)))
            if status is not None and status is not blueprint.status:
                self._check_validated(blueprint, status)
                blueprint = self.step(change, blueprint, status, role, detail)
            self._table.set(blueprint_id, blueprint)
        return blueprint

    def step(
        self, change: Change, blueprint: Blueprint, status: ArtifactStatus, role: Role, detail: str = ""
    ) -> Blueprint:
        """Return the blueprint with its next status, and note the step."""
        check_step(blueprint.status, status)
        change.note(role, "status", blueprint.id, before=blueprint.status, after=status, detail=detail)
        if detail:
            self._core.records.set_text(f"reason/{blueprint.id}", detail)
        return blueprint.model_copy(update={"status": status})

    def compiled(self, change: Change, blueprint_id: str, kernel_id: str) -> None:
        """A kernel of the blueprint was put into the store."""
        blueprint = self._table.get(blueprint_id)
        if blueprint is None:
            return
        if kernel_id not in blueprint.kernels:
            blueprint = blueprint.model_copy(update={"kernels": (*blueprint.kernels, kernel_id)})
        if blueprint.status not in _AHEAD:
            if blueprint.status is not _S.COMPILING:
                blueprint = self.step(change, blueprint, _S.COMPILING, Role.TEZZERET)
            blueprint = self.step(change, blueprint, _S.PENDING_BENCHMARKING, Role.TEZZERET)
        self._table.set(blueprint_id, blueprint)

    def judged(self, change: Change, blueprint_id: str, status: ArtifactStatus, detail: str) -> None:
        """A kernel of the blueprint was judged; the first good one validates it, and a bad one beside it is no loss."""
        blueprint = self._table.get(blueprint_id)
        if blueprint is not None and blueprint.status is _S.PENDING_BENCHMARKING:
            self._table.set(blueprint_id, self.step(change, blueprint, status, Role.URABRASK, detail))

    def reported(self, change: Change, report: FieldReport) -> None:
        """Feed what a graft really did into the interest of its blueprint, found by its name."""
        for blueprint_id, blueprint in self._table.items():
            if blueprint.name == report.blueprint_id:
                scores = field_interest(blueprint.interest_scores, report)
                self._table.set(blueprint_id, blueprint.model_copy(update={"interest_scores": scores}))
                change.note("", "interest", blueprint_id, detail=f"{FIELD} {scores[FIELD]:.3f} after {report.outcome}")

    def _check_place(self, blueprint: Blueprint) -> None:
        """Raise unless the parents are known, and the name and version free."""
        unknown = [parent for parent in blueprint.parents if self._table.get(parent) is None]
        if unknown:
            raise StoreError(f"{blueprint.name}: parent {unknown[0]!r} is not in the store; submit it first.")
        taken = self._core.records.text(_version(blueprint))
        if taken:
            name = f"{blueprint.name}@{blueprint.version}"
            raise StoreError(f"{name} is already the name of {taken[:12]}; give {blueprint.id[:12]} a new version.")

    def _check_validated(self, blueprint: Blueprint, status: ArtifactStatus) -> None:
        kernels = (self._core.records.kernels.get(kernel) for kernel in blueprint.kernels)
        if status is _S.VALIDATED and not any(kernel and kernel.status is _S.VALIDATED for kernel in kernels):
            raise StoreError(f"{blueprint.name} has no VALIDATED kernel; have one judged, and the blueprint follows.")


def field_interest(scores: Mapping[str, float], report: FieldReport) -> dict[str, float]:
    """Return the scores with that of the field moved a fifth of the way: towards 1 for a graft that stayed, else 0.

    A graft that ended because its run did, or was called off by hand, says nothing of either.

    Example:
        >>> from esper import leyline as ll
        >>> site = ll.SiteInfo(module_path="a", module_type="Linear", layout="bd", width=8, input_width=8, depth=0.5)
        >>> stayed = {"outcome": "FOSSILIZED", "reason": "GATE_PASSED"}
        >>> report = ll.FieldReport(run_id="r", blueprint_id="b", seed_id="a#0.0", site=site, **stayed)
        >>> field_interest({"field": 0.5}, report)
        {'field': 0.6}
    """
    before = scores.get(FIELD, 0.5)
    towards = before if report.reason in _TELLS_NOTHING else float(report.outcome is SeedState.FOSSILIZED)
    return {**scores, FIELD: round(before + _WEIGHT * (towards - before), 6)}


def _interested(blueprint: Blueprint, interest: Mapping[str, float]) -> Blueprint:
    bad = [name for name, score in interest.items() if not 0.0 <= score <= 1.0]
    if bad:
        raise StoreError(f"{blueprint.name}: interest {bad[0]!r} is {interest[bad[0]]}; give a score from 0 to 1.")
    return blueprint.model_copy(update={"interest_scores": {**blueprint.interest_scores, **interest}})


def _version(blueprint: Blueprint) -> str:
    return f"version/{blueprint.name}@{blueprint.version}"


def check_id(blueprint: Blueprint) -> None:
    """Check that a blueprint's id names its IR.

    Raises:
        StoreError: the IR is no JSON.
        BadHash: the id is not the SHA-256 of its canonical text.
    """
    try:
        text = canonical_text(json.loads(blueprint.ir))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{blueprint.name}: its IR is not JSON: {error}.") from error
    if hashlib.sha256(text).hexdigest() != blueprint.id:
        raise BadHash(f"{blueprint.name}: {blueprint.id[:12]!r} is not the SHA-256 of its canonical IR.")
