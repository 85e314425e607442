"""What happens to compiled kernels in the store: put by Tezzeret, judged by Urabrask, archived and brought back."""

import time
from typing import Any, Final, final

from esper.leyline.artifacts import Attestation, CompiledKernel, KernelManifest, Role
from esper.leyline.errors import BadHash, StaleManifest, StoreError
from esper.leyline.kernels import (
    ArtifactStatus,
    CompilationRecord,
    CompiledKernelArtifact,
    UrabraskValidationReport,
)
from esper.leyline.reports import FieldReport
from esper.urza.artifacts import MANIFEST, SIGNATURE, check_name
from esper.urza.canonical import canonical, parse, sha256
from esper.urza.changes import Change, Core, check_step
from esper.urza.designs import Designs, field_interest
from esper.urza.door import Door, mark
from esper.urza.field import FieldReports, report_id
from esper.urza.records import Table, Use

IR: Final = "ir.json"

_S = ArtifactStatus
_SETTLED: Final = frozenset({_S.PENDING_BENCHMARKING, _S.VALIDATED, _S.REJECTED})


@final
class Kernels:
    """The compiled kernels of a store.

    Args:
        core: the store.
        door: its checks.
        designs: its blueprints.
        reports: what became of grafts.
    """

    def __init__(self, core: Core, door: Door, designs: Designs, reports: FieldReports) -> None:
        """Remember the store."""
        self._core, self._door, self._designs, self._reports = core, door, designs, reports
        self._table = core.records.kernels

    def put(self, kernel: CompiledKernel, role: Role) -> CompiledKernelArtifact:
        """Write a compiled kernel, signed, as PENDING_BENCHMARKING; one that is there already stays as it is.

        Raises:
            ContractError: the manifest or the record is malformed.
            BadHash: a file differs from the manifest.
            UnsafePath: a file's name leaves its folder.
            WrongRole: only Tezzeret may put kernels.
            StoreError: it is too large, or the disk is full.
        """
        draft = parse(KernelManifest, kernel.manifest)
        record = parse(CompilationRecord, kernel.record) if kernel.record else None
        files = _checked_files(draft, kernel)
        known = self._table.get(draft.kernel_id)
        if known is not None and known.status in _SETTLED:
            return known
        manifest = self._numbered(draft, files)
        text = canonical(manifest)
        statement = self._core.keys.attest(
            Attestation(
                kernel_artifact_id=manifest.kernel_id,
                artifact_hash=sha256(text),
                status=_S.PENDING_BENCHMARKING,
                role=role,
                serial=manifest.serial,
            )
        )
        self._core.tree.write(statement.artifact_hash, {**files, MANIFEST: text, SIGNATURE: canonical(statement)})
        entered = self._entered(manifest, statement, record)
        if entered.kernel_ref != statement.artifact_hash:
            self._core.tree.remove(statement.artifact_hash)
        return entered

    def judge(self, report: UrabraskValidationReport, rejection: str | None) -> CompiledKernelArtifact:
        """Sign and write Urabrask's verdict; the same verdict twice is one.

        Raises:
            IllegalTransition: the kernel does not wait for a verdict.
            TrustError: the files are no longer those that were put, or Urabrask's key is not here.
            StoreError: there is no such kernel, or verdict and reason contradict each other.
        """
        kernel = self._table.need(report.kernel_artifact_id)
        if kernel.validation_report == report and kernel.status in _SETTLED:
            return kernel
        if report.passed_validation == bool(rejection):
            raise StoreError(f"{kernel.id}: a verdict is either passed, or has a reason; got {rejection!r}.")
        return self.state(kernel, _S.REJECTED if rejection else _S.VALIDATED, report, rejection or "")

    def state(
        self,
        kernel: CompiledKernelArtifact,
        status: ArtifactStatus,
        report: UrabraskValidationReport | None,
        detail: str,
    ) -> CompiledKernelArtifact:
        """Sign a statement of Urabrask with a fresh serial, and take it in."""
        with self._core.records.transaction():
            serial = self._core.records.next_serial()
        statement = Attestation(
            kernel_artifact_id=kernel.id,
            artifact_hash=kernel.kernel_ref,
            status=status,
            role=Role.URABRASK,
            serial=serial,
        )
        return self.attest(self._core.keys.attest(statement), report, detail)

    def attest(
        self, statement: Attestation, report: UrabraskValidationReport | None, detail: str
    ) -> CompiledKernelArtifact:
        """Take a signed statement in; the only way to VALIDATED.

        Raises:
            WrongRole: the role may not say this; only Urabrask's statements change the status here.
            BadSignature: it is not signed by that role.
            StaleManifest: the role has said something since.
            BadHash: it is about other files than those in the store.
            IllegalTransition: the status may not follow the present one.
        """
        self._core.keys.check(statement)
        if statement.status is _S.VALIDATED:
            self._door.signed(self._table.need(statement.kernel_artifact_id))
        with self._core.change() as change:
            kernel = self._table.need(statement.kernel_artifact_id)
            if statement.artifact_hash != kernel.kernel_ref:
                raise BadHash(f"The statement is about {statement.artifact_hash[:12]}, {kernel.id} is now another one.")
            self._latest(statement)
            update = {"validation_report": report or kernel.validation_report}
            kernel = self._stepped(change, kernel, statement.status, statement.role, detail, **update)
            self._designs.judged(change, kernel.blueprint_id, statement.status, detail)
        self._door.latest(kernel.id, statement.role)
        return kernel

    def step(self, kernel_id: str, status: ArtifactStatus, role: Role, detail: str) -> CompiledKernelArtifact:
        """Change a status that needs no statement: COMPILING, INVALID, ARCHIVED, or back from the archive.

        Raises:
            StoreError: the status needs a statement; see `judge`.
            IllegalTransition: the status may not follow the present one.
        """
        if status in (_S.VALIDATED, _S.REJECTED):
            raise StoreError(f"{kernel_id} becomes {status} by a signed verdict only; call `judge` or `reject`.")
        with self._core.change() as change:
            return self._stepped(change, self._table.need(kernel_id), status, role, detail)

    def interest(self, kernel_id: str, source: str, score: float) -> CompiledKernelArtifact:
        """Write how much a kernel is wanted, by one source; 0 to 1."""
        if not 0.0 <= score <= 1.0:
            raise StoreError(f"{kernel_id}: interest {source!r} is {score}; give a score from 0 to 1.")
        with self._core.change() as change:
            kernel = self._table.need(kernel_id)
            kernel = kernel.model_copy(update={"interest_scores": {**kernel.interest_scores, source: score}})
            self._table.set(kernel_id, kernel)
            change.note("", "interest", kernel_id, detail=f"{source} {score:.3f}")
        return kernel

    def give_up(self, kernel_id: str) -> str:
        """Forget the records of a kernel where one of them is damaged; its serials stay, so that none is said twice.

        Returns:
            What was wrong; empty where nothing was, and nothing was done.

        Raises:
            SchemaMismatch: another release has written a record.
            TrustError: a row was not written by Urza.
            StoreError: the records cannot be read or written.
        """
        if not self._damage(kernel_id):
            return ""
        with self._core.change() as change:
            # Looked at once more: another process may have given them up since, and put the kernel anew.
            problems = self._damage(kernel_id)
            for table, key in self._rows(kernel_id):
                if problems:
                    table.drop(key)
            for problem in problems:
                change.note("", "given up", kernel_id, detail=problem)
        return " ".join(problems)

    def used(self, kernel_id: str, times: int) -> None:
        """Count uses; no line of the ledger, as they are many and change nothing of worth."""
        with self._core.records.transaction():
            self._count_use(kernel_id, times)

    def reported(self, report: FieldReport) -> bool:
        """Keep what a graft really did, as a use of its kernel, and feed it into the interest of kernel and blueprint.

        Returns:
            Whether it is news; a report that is known changes nothing.

        Raises:
            ContractError: it is too long.
        """
        name = report_id(report)
        with self._core.change() as change:
            if self._reports.knows(name):
                return False
            self._designs.reported(change, report)
            kernel = self._table.get(report.kernel_artifact_id)
            if kernel is not None:
                scores = field_interest(kernel.interest_scores, report)
                self._table.set(kernel.id, kernel.model_copy(update={"interest_scores": scores}))
                change.note("", "interest", kernel.id, detail=f"field report: {report.outcome}")
                self._count_use(kernel.id, 1)
            self._reports.keep(report, counts=kernel is not None)
        return True

    def _rows(self, kernel_id: str) -> list[tuple[Table[Any], str]]:
        """Return where the records are that a kernel cannot do without."""
        records = self._core.records
        statements = [(records.attestations, f"{kernel_id}/{role}") for role in (Role.TEZZERET, Role.URABRASK)]
        return [(records.kernels, kernel_id), (records.manifests, kernel_id), *statements]

    def _damage(self, kernel_id: str) -> list[str]:
        return [problem for table, key in self._rows(kernel_id) if (problem := table.damage(key))]

    def _count_use(self, kernel_id: str, times: int) -> None:
        use = self._core.records.uses.get(kernel_id) or Use()
        self._core.records.uses.set(kernel_id, Use(count=use.count + times, last=time.time()))

    def _numbered(self, draft: KernelManifest, files: dict[str, bytes]) -> KernelManifest:
        """Return the manifest as it will be signed: every file, a fresh serial, the time."""
        with self._core.records.transaction():
            serial = self._core.records.next_serial()
        hashes = {IR: sha256(files[IR]), **draft.files}
        return draft.model_copy(update={"files": hashes, "serial": serial, "created": draft.created or time.time()})

    def _entered(
        self, manifest: KernelManifest, statement: Attestation, record: CompilationRecord | None
    ) -> CompiledKernelArtifact:
        """Write the records of an artifact whose files are in place."""
        with self._core.change() as change:
            known = self._table.get(manifest.kernel_id)
            if known is not None and known.status in _SETTLED:
                return known
            self._latest(statement)
            kernel = _artifact(manifest, known, statement.artifact_hash, record)
            if known is not None and known.status is not _S.COMPILING:
                kernel = self._stepped(change, kernel, _S.COMPILING, statement.role, "")
            self._core.records.manifests.set(kernel.id, manifest)
            kernel = self._stepped(change, kernel, _S.PENDING_BENCHMARKING, statement.role, "")
            self._designs.compiled(change, kernel.blueprint_id, kernel.id)
        self._door.latest(kernel.id, statement.role)
        return kernel

    def _stepped(
        self,
        change: Change,
        kernel: CompiledKernelArtifact,
        status: ArtifactStatus,
        role: Role,
        detail: str,
        **update: object,
    ) -> CompiledKernelArtifact:
        check_step(kernel.status, status)
        change.note(role, "status", kernel.id, before=kernel.status, after=status, detail=detail)
        if detail:
            self._core.records.set_text(f"reason/{kernel.id}", detail)
        kernel = kernel.model_copy(update={**update, "status": status})
        self._table.set(kernel.id, kernel)
        return kernel

    def _latest(self, statement: Attestation) -> None:
        """Keep a statement as the one in force.

        Raises:
            StaleManifest: its role has said something since.
        """
        kernel_id, role = statement.kernel_artifact_id, statement.role
        latest = self._door.latest(kernel_id, role)
        if statement.serial <= latest:
            raise StaleManifest(f"{role} has said {latest} of {kernel_id}; {statement.serial} is no later statement.")
        self._core.records.attestations.set(f"{kernel_id}/{role}", statement)
        self._core.records.set_number(mark(kernel_id, role), statement.serial)


def _checked_files(manifest: KernelManifest, kernel: CompiledKernel) -> dict[str, bytes]:
    """Return the files of an artifact, the blueprint among them, after comparing them with the manifest."""
    for name in (manifest.kernel_id, *kernel.files, *manifest.files):
        check_name(name)
    reserved = {MANIFEST, SIGNATURE} & set(kernel.files)
    if reserved:
        raise BadHash(
            f"{manifest.kernel_id}: {sorted(reserved)[0]} is written by the store; leave it out of the files."
        )
    found = {name: sha256(data) for name, data in kernel.files.items()}
    if found != manifest.files:
        differing = sorted(dict(found.items() ^ manifest.files.items()))
        raise BadHash(f"{manifest.kernel_id}: files differ from the manifest: {', '.join(differing)[:200]}.")
    return {IR: manifest.spec.ir.encode(), **kernel.files}


def _artifact(
    manifest: KernelManifest, known: CompiledKernelArtifact | None, ref: str, record: CompilationRecord | None
) -> CompiledKernelArtifact:
    """Return the record of a compiled kernel: a fresh one, or the known one with its new content."""
    content = {"kernel_ref": ref, "compilation_record": record, "validation_report": None}
    if known is not None:
        return known.model_copy(update=content)
    return CompiledKernelArtifact(
        id=manifest.kernel_id,
        name=manifest.name,
        version=manifest.version,
        status=_S.COMPILING,
        blueprint_id=manifest.blueprint_id,
        compilation_pipeline=manifest.pipeline,
        kernel_ref=ref,
        compilation_record=record,
    )
