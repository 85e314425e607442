"""Urza: blueprints, compiled kernels, what others vouched for, and the ledger of it all, in one folder."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self, final

from esper.leyline.artifacts import Attestation, CompiledKernel, KernelManifest, KernelSpec, Role
from esper.leyline.errors import BadHash, ConfigError, StoreError, TrustError
from esper.leyline.events import SecurityAlert
from esper.leyline.kernels import (
    ArtifactStatus,
    Blueprint,
    CompiledKernelArtifact,
    KernelQuery,
    KernelQueryResult,
    UrabraskValidationReport,
)
from esper.leyline.reports import FieldReport
from esper.urza import curate
from esper.urza.artifacts import ArtifactTree
from esper.urza.catalogue import Catalogue
from esper.urza.changes import Core
from esper.urza.check import Finding, check
from esper.urza.compiled import Kernels
from esper.urza.curate import BUDGET, Curation, Plan
from esper.urza.designs import Designs
from esper.urza.door import Door, VerifiedKernel, alert_of
from esper.urza.field import FieldReports, Kept, Outcomes
from esper.urza.ledger import Ledger
from esper.urza.lineage import Lineage
from esper.urza.records import Head, Records
from esper.urza.retention import Archive
from esper.urza.signing import KeyRing

OnAlert = Callable[[SecurityAlert], None]
"""Hears of every failed check of trust."""

_NO_INTEREST: Final[Mapping[str, float]] = {}


def _ignore(alert: SecurityAlert) -> None:
    """Leave the alert to the records."""


@final
class Urza:
    """The store; processes may open the same folder, threads share one store, and any of them may die at any moment.

    Args:
        root: its folder; made if it is not there.
        keys: the keys of the roles, from a folder outside the store; a reader needs the public ones only.
        on_alert: is called with every failed check, besides the record of it.

    Raises:
        ConfigError: the keys lie inside the store.
        StoreError: the store cannot be opened.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Urza(f"{folder}/store", KeyRing(f"{folder}/keys")) as urza:
        ...         urza.find(KernelQuery()).matching_kernels
        ()
    """

    def __init__(self, root: str | Path, keys: KeyRing, *, on_alert: OnAlert = _ignore) -> None:
        """Open the folder."""
        self.root = Path(root).resolve()
        if keys.folder.resolve().is_relative_to(self.root):
            raise ConfigError(f"The keys in {keys.folder} lie inside the store {self.root}; keep them elsewhere.")
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._on_alert = on_alert
        self.core = Core(
            Records(self.root / "records"),
            Ledger(self.root / "ledger.jsonl"),
            ArtifactTree(self.root / "artifacts"),
            keys,
        )
        self._door = Door(self.core)
        self._designs = Designs(self.core)
        self._reports = FieldReports(self.core.records)
        self._kernels = Kernels(self.core, self._door, self._designs, self._reports)
        self._archive = Archive(self.root / "archive", self.core.tree)
        self._catalogue = Catalogue()
        self._reading = threading.Lock()
        self._known = Head()
        self._restarts = -1

    # --- blueprints -------------------------------------------------------------------------------------------------

    def submit(self, blueprint: Blueprint, submitter: str = "") -> Blueprint:
        """Take a blueprint in as UNVALIDATED; one that is there already is returned as it is.

        Raises:
            BadHash: its id is not the SHA-256 of its canonical IR.
            StoreError: a parent is unknown, or its name and version belong to another IR.
        """
        return self._designs.submit(blueprint, submitter)

    def blueprint(self, blueprint_id: str) -> Blueprint:
        """Return a blueprint.

        Raises:
            StoreError: there is none of this id.
        """
        return self.core.records.blueprints.need(blueprint_id)

    def blueprints(self) -> list[Blueprint]:
        """Return every blueprint."""
        return [blueprint for _, blueprint in self.core.records.blueprints.items()]

    def set_blueprint(
        self,
        blueprint_id: str,
        status: ArtifactStatus | None = None,
        *,
        interest: Mapping[str, float] = _NO_INTEREST,
        detail: str = "",
        role: Role = Role.TEZZERET,
    ) -> Blueprint:
        """Change a blueprint: its next status with the reason, or how much it is wanted by source.

        Raises:
            IllegalTransition: the status may not follow the present one.
            StoreError: there is no such blueprint.
        """
        return self._designs.update(blueprint_id, status, interest, detail, role)

    # --- kernels ----------------------------------------------------------------------------------------------------

    def put(self, kernel: CompiledKernel, role: Role = Role.TEZZERET) -> CompiledKernelArtifact:
        """Write a compiled kernel, signed, as PENDING_BENCHMARKING; putting it again changes nothing.

        Raises:
            BadHash: a file differs from the manifest.
            UnsafePath: a file's name leaves its folder.
            WrongRole: the role may not put kernels, or its private key is not here.
            StoreError: it is too large, or the disk is full.
        """
        with self._watching(kernel.manifest[:80]):
            return self._kernels.put(kernel, role)

    def judge(self, report: UrabraskValidationReport, rejection: str | None = None) -> CompiledKernelArtifact:
        """Sign and write Urabrask's verdict on a kernel; the files are verified before a VALIDATED is signed.

        Args:
            report: the verdict.
            rejection: why it failed; None when it passed.

        Raises:
            IllegalTransition: the kernel does not wait for a verdict.
            TrustError: its files are no longer those that were put.
        """
        with self._watching(report.kernel_artifact_id):
            return self._kernels.judge(report, rejection)

    def reject(self, kernel_id: str, reason: str) -> CompiledKernelArtifact:
        """Withdraw a VALIDATED kernel, signed by Urabrask: it faulted in a run, and is not offered again."""
        with self._watching(kernel_id):
            return self._kernels.state(self.kernel(kernel_id), ArtifactStatus.REJECTED, None, reason)

    def attest(self, statement: Attestation) -> CompiledKernelArtifact:
        """Take in a statement that was signed elsewhere.

        Raises:
            TrustError: signature, role, serial or hash is wrong; the subclass says which.
        """
        with self._watching(statement.kernel_artifact_id):
            return self._kernels.attest(statement, None, "")

    def set_kernel(
        self, kernel_id: str, status: ArtifactStatus, *, detail: str = "", role: Role = Role.TEZZERET
    ) -> CompiledKernelArtifact:
        """Change a status that needs no verdict, e.g. to COMPILING for a recompilation.

        Raises:
            IllegalTransition: it may not follow the present one.
        """
        return self._kernels.step(kernel_id, status, role, detail)

    def kernel(self, kernel_id: str) -> CompiledKernelArtifact:
        """Return a kernel's record.

        Raises:
            StoreError: there is none of this id.
        """
        return self.core.records.kernels.need(kernel_id)

    def has(self, kernel_id: str) -> bool:
        """Whether there is a kernel of this id."""
        return self.core.records.kernels.get(kernel_id) is not None

    def kernels(self) -> list[CompiledKernelArtifact]:
        """Return every kernel's record."""
        return [kernel for _, kernel in self.core.records.kernels.items()]

    def give_up_damaged(self, kernel_id: str) -> str:
        """Forget a kernel one of whose records is damaged, so that it can be made anew; ledger and alert say why.

        Returns:
            What was wrong, as `check` says it; empty where every record can be read, and nothing was done.

        Raises:
            SchemaMismatch: another release has written a record; it stays.
            TrustError: a row was not written by Urza; it stays, and an alert is kept.
            StoreError: the records cannot be read or written.
        """
        with self._watching(kernel_id):
            problem = self._kernels.give_up(kernel_id)
        if problem:
            self._alert(BadHash(problem), kernel_id)
        return problem

    def manifest(self, kernel_id: str) -> KernelManifest:
        """Return a kernel's manifest as the records have it; `verified` returns the signed one."""
        return self.core.records.manifests.need(kernel_id)

    def folder(self, kernel_id: str) -> Path:
        """Return the folder of a kernel's files, unchecked; `verified` checks them."""
        return self.core.tree.path(self.kernel(kernel_id).kernel_ref)

    def verified(self, kernel_id: str, fingerprint: str = "") -> VerifiedKernel:
        """Return a VALIDATED kernel after checking every signature, serial and byte of it.

        Args:
            kernel_id: the kernel.
            fingerprint: of the binary interface of this process; empty takes any.

        Raises:
            StoreError: there is no such kernel, or it is not VALIDATED.
            TrustError: a check failed; the subclass says which, and an alert is kept.
        """
        with self._watching(kernel_id):
            return self._door.verified(kernel_id, fingerprint)

    def reason(self, subject: str) -> str:
        """Return why a kernel or blueprint got its last status; empty if nobody said."""
        return self.core.records.text(f"reason/{subject}")

    # --- queries ----------------------------------------------------------------------------------------------------

    def find(self, query: KernelQuery) -> KernelQueryResult:
        """Return the VALIDATED kernels that match, the best of them ranked with reasons."""
        with self._reading:
            self._refresh()
            return self._catalogue.find(query)

    def of_spec(self, spec: KernelSpec, fingerprint: str = "") -> list[str]:
        """Return the ids of the VALIDATED kernels of exactly this spec, fastest first.

        Args:
            spec: the kernel.
            fingerprint: of the binary interface that they must be for; empty takes any.
        """
        with self._reading:
            self._refresh()
            return self._catalogue.of_spec(spec, fingerprint)

    @property
    def lineage(self) -> Lineage:
        """What was derived from what, as the records have it now."""
        return Lineage.of(self.blueprints(), self.kernels(), self._reports)

    @property
    def ledger(self) -> Ledger:
        """The chain of everything that was done."""
        return self.core.ledger

    def alerts(self) -> list[SecurityAlert]:
        """Return every failed check of trust, the oldest first."""
        return [alert for _, alert in self.core.records.alerts.items()]

    # --- use and interest -------------------------------------------------------------------------------------------

    def used(self, kernel_id: str, times: int = 1) -> None:
        """Count uses of a kernel; what is used stays."""
        self._kernels.used(kernel_id, times)

    def interest(self, kernel_id: str, source: str, score: float) -> CompiledKernelArtifact:
        """Write how much a kernel is wanted by one source, 0 to 1."""
        return self._kernels.interest(kernel_id, source, score)

    def report(self, report: FieldReport) -> bool:
        """Keep what a graft really did: a use of its kernel, and a vote for or against it and its blueprint.

        Returns:
            Whether it is news; the same report again changes nothing.

        Raises:
            ContractError: it is too long.
        """
        return self._kernels.reported(report)

    def reports(self) -> list[Kept]:
        """Return the field reports, in the order in which they came; the oldest are given up where there are many."""
        return list(self._reports)

    def outcomes(self, kernel_id: str) -> Outcomes:
        """Return how often a kernel was grafted, and how that ended."""
        return self._reports.outcomes(kernel_id)

    # --- upkeep -----------------------------------------------------------------------------------------------------

    def curate(self, budget: int = BUDGET) -> Curation:
        """Archive what the budget of bytes has no room for, clear away what was left over, and check everything."""
        return curate.apply(self.core, self._door, self._kernels, self._archive, self.curation(budget))

    def curation(self, budget: int = BUDGET) -> Plan:
        """Return what `curate` would do now; nothing is written."""
        return curate.plan(self.core, budget)

    def restore(self, kernel_id: str) -> CompiledKernelArtifact:
        """Bring an archived kernel back to hand, as PENDING_BENCHMARKING.

        Raises:
            StoreError: it is not archived, or the archive is damaged.
            TrustError: the archive does not hold what was signed.
        """
        with self._watching(kernel_id):
            return curate.restore(self.core, self._door, self._kernels, self._archive, kernel_id)

    def check(self) -> list[Finding]:
        """Return what is wrong with the store; nothing is repaired."""
        return check(self.core, self._archive)

    def restart_ledger(self, reason: str) -> str:
        """Move a broken ledger aside and begin a new chain that says so; returns where the old one is."""
        return self.core.restart_ledger(reason)

    def close(self) -> None:
        """Close the database; may be called twice."""
        self.core.records.close()

    def __enter__(self) -> Self:
        """Return the store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    @contextmanager
    def _watching(self, subject: str) -> Iterator[None]:
        """Keep an alert of every failed check of trust, and let the error go on."""
        try:
            yield
        except TrustError as error:
            self._alert(error, subject)
            raise

    def _alert(self, error: TrustError, subject: str) -> None:
        """Keep a failed check in records and ledger, and tell who listens; a broken store does not hide it."""
        alert = alert_of(error, subject)
        try:
            with self.core.change() as change:
                self.core.records.alerts.set(f"{time.time_ns():020d}", alert)
                change.note("", "alert", subject, detail=alert.detail)
        except StoreError as broken:
            error.add_note(f"The alert could not be kept: {broken}")
        self._on_alert(alert)

    def _refresh(self) -> None:
        """Bring the catalogue up to the records: by the ledger's new lines, or from scratch."""
        head, restarts = self.core.records.head(), self.core.records.number("restarts")
        if head == self._known:
            return
        changed = self._changed(head) if restarts == self._restarts else None
        if changed is None:
            self._catalogue, changed = Catalogue(), set(self.core.records.kernels.keys())
        for kernel_id in sorted(changed):
            try:
                kernel, manifest = self.core.records.kernels.get(kernel_id), self.core.records.manifests.get(kernel_id)
            except StoreError:
                kernel = manifest = None  # One damaged record takes no other kernel away; `check` reports it.
            if kernel is not None and manifest is not None:
                self._catalogue.update(kernel, manifest)
            else:
                self._catalogue.withdraw(kernel_id)
        self._known, self._restarts = head, restarts

    def _changed(self, head: Head) -> set[str] | None:
        """Return the subjects of the lines since the last look; None when they cannot be read."""
        subjects: set[str] = set()
        try:
            for entry in self.core.ledger.entries(self._known.size):
                subjects.add(entry.subject)
                if entry.sequence >= head.sequence:
                    break
        except StoreError:
            return None  # `check` reports the damage; the records know the kernels all the same.
        return subjects
