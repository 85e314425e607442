"""The nightly curation: a plan that only reads, and its execution: archive, clear away what was left over, verify."""

import logging
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from esper.leyline.artifacts import Role
from esper.leyline.errors import EsperError, StoreError
from esper.leyline.kernels import ArtifactStatus, CompiledKernelArtifact
from esper.urza.changes import Core
from esper.urza.check import Finding, check
from esper.urza.compiled import Kernels
from esper.urza.door import Door
from esper.urza.records import Use
from esper.urza.retention import Archive, Holding, to_archive

_log = logging.getLogger(__name__)

BUDGET: Final = 2 * 2**30
"""Bytes that artifacts at hand may take, unless said otherwise."""
SETTLED_S: Final = 3600.0
"""Age from which a folder without a record is left over, in seconds; a younger one may be in the making."""


class Plan(NamedTuple):
    """What a curation would do.

    Args:
        archive: kernels to archive, the least worth first.
        loose: hashes of folders that no kernel at hand refers to.
        at_hand: bytes of all artifacts before.
    """

    archive: tuple[str, ...]
    loose: tuple[str, ...]
    at_hand: int


class Curation(NamedTuple):
    """What a curation did.

    Args:
        archived: kernels that were archived.
        cleared: hashes of folders that were moved to the archive because nothing referred to them.
        swept: unfinished folders of killed writers that were removed.
        freed: bytes that the artifacts at hand take less than before.
        findings: what is wrong with the store; curation repairs none of it.
    """

    archived: tuple[str, ...]
    cleared: tuple[str, ...]
    swept: int
    freed: int
    findings: tuple[Finding, ...]


def plan(core: Core, budget: int = BUDGET, settled_s: float = SETTLED_S) -> Plan:
    """Return what a curation would do now; nothing is written.

    Args:
        core: the store.
        budget: bytes that artifacts at hand may take.
        settled_s: age from which a folder without a record is left over, in seconds.
    """
    found = [kernel for _, kernel in core.records.kernels.items()]
    kernels = [kernel for kernel in found if kernel.status is not ArtifactStatus.ARCHIVED]
    held = {kernel.kernel_ref for kernel in kernels}
    # A kernel whose record is damaged may hold any of the folders.
    refs = core.tree.refs() if len(found) == len(core.records.kernels.keys()) else []
    loose = [ref for ref in refs if ref not in held and core.tree.age_s(ref) >= settled_s]
    at_hand = sum(core.tree.size(ref) for ref in core.tree.refs())
    return Plan(tuple(to_archive(_holdings(core, kernels), budget)), tuple(loose), at_hand)


def apply(core: Core, door: Door, kernels: Kernels, archive: Archive, todo: Plan) -> Curation:
    """Do what a plan says. Interrupted at any moment, every artifact is at hand or in the archive, and often in both.

    Args:
        core: the store.
        door: its checks; a damaged artifact is not archived, it is a finding.
        kernels: its kernels.
        archive: where to.
        todo: the plan.
    """
    findings, archived, cleared = [], [], []
    for kernel_id in todo.archive:
        try:
            _archive(core, door, kernels, archive, core.records.kernels.need(kernel_id))
            archived.append(kernel_id)
        except EsperError as error:
            findings.append(Finding(kernel_id, f"not archived: {error}"))
    for ref in todo.loose:
        try:
            _clear(core, archive, ref)
            cleared.append(ref)
        except EsperError as error:
            findings.append(Finding(ref, f"not cleared away: {error}"))
    swept = core.tree.sweep()
    core.records.compact()
    freed = todo.at_hand - sum(core.tree.size(ref) for ref in core.tree.refs())
    findings += [finding for finding in check(core, archive) if finding not in findings]
    return Curation(tuple(archived), tuple(cleared), swept, freed, tuple(findings))


def restore(core: Core, door: Door, kernels: Kernels, archive: Archive, kernel_id: str) -> CompiledKernelArtifact:
    """Bring an archived kernel back to hand; it waits for a new verdict, as the machine may have changed since.

    Raises:
        StoreError: there is no such kernel, it is not archived, or the archive is damaged.
        TrustError: the archive does not hold what was signed.
    """
    kernel = core.records.kernels.need(kernel_id)
    if kernel.status is ArtifactStatus.ARCHIVED:
        archive.unpack(kernel.kernel_ref)
        door.signed(kernel)
    return kernels.step(kernel_id, ArtifactStatus.PENDING_BENCHMARKING, Role.TEZZERET, "restored from the archive")


def _archive(core: Core, door: Door, kernels: Kernels, archive: Archive, kernel: CompiledKernelArtifact) -> None:
    door.signed(kernel)
    archive.pack(kernel.kernel_ref)
    kernels.step(kernel.id, ArtifactStatus.ARCHIVED, Role.TEZZERET, "archived by the curation")
    core.tree.remove(kernel.kernel_ref)


def _clear(core: Core, archive: Archive, ref: str) -> None:
    """Move a folder to the archive; what is there already is not written over by what was left lying about."""
    if not archive.path(ref).exists():
        archive.pack(ref)
    archive.read(ref)
    core.tree.remove(ref)


def _holdings(core: Core, kernels: list[CompiledKernelArtifact]) -> Iterator[Holding]:
    now = time.time()
    for kernel in kernels:
        try:
            use = core.records.uses.get(kernel.id) or Use()
            manifest = core.records.manifests.get(kernel.id)
        except StoreError as error:
            # It stays at hand: what it is worth cannot be told, and `check` reports the damage.
            _log.warning("%s", error)
            continue
        record = kernel.compilation_record
        since = max(use.last, manifest.created if manifest else 0.0)
        yield Holding(
            kernel.id,
            kernel.status,
            core.tree.size(kernel.kernel_ref),
            use.count,
            max(0.0, now - since),
            record.cpu_seconds if record else 0.0,
        )
