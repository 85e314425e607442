"""The loader's door: nothing that a process would run leaves the store without passing all of these checks.

Order: the verdict's signature, role and serial; the manifest's signature, role and serial; the manifest's hash; only
then is it parsed; the fingerprint; the folder's content; the hash of every file.
"""

from pathlib import Path
from typing import NamedTuple, final

from esper.leyline.artifacts import Attestation, KernelManifest, Role
from esper.leyline.errors import (
    BadHash,
    BadSignature,
    ContractError,
    StaleManifest,
    StoreError,
    TrustError,
    WrongFingerprint,
    WrongRole,
)
from esper.leyline.events import SecurityAlert, Violation
from esper.leyline.kernels import ArtifactStatus, CompiledKernelArtifact
from esper.urza.artifacts import MANIFEST, SIGNATURE, hash_file, names, read_file
from esper.urza.canonical import parse, sha256
from esper.urza.changes import Core


class VerifiedKernel(NamedTuple):
    """A kernel whose every byte is what Tezzeret signed and Urabrask vouched for.

    Args:
        manifest: what it is.
        folder: where its files are; its name is its content hash, so no other kernel is ever found there.
        attestation: Urabrask's verdict.
    """

    manifest: KernelManifest
    folder: Path
    attestation: Attestation


@final
class Door:
    """Checks kernels on their way out, and statements on their way in.

    Args:
        core: the store.
    """

    def __init__(self, core: Core) -> None:
        """Start with no serial seen."""
        self._core = core
        self._seen: dict[tuple[str, Role], int] = {}

    def verified(self, kernel_id: str, fingerprint: str = "") -> VerifiedKernel:
        """Check a kernel and its verdict.

        Args:
            kernel_id: the kernel.
            fingerprint: of the binary interface of this process; empty takes any.

        Raises:
            StoreError: there is no such kernel, or it is not VALIDATED.
            TrustError: one of the checks failed; the subclass says which.
        """
        kernel = self._core.records.kernels.need(kernel_id)
        if kernel.status is not ArtifactStatus.VALIDATED:
            raise StoreError(f"Kernel {kernel_id} is {kernel.status}; only VALIDATED kernels are loaded.")
        verdict = self._verdict(kernel)
        manifest = self.signed(kernel, fingerprint)
        return VerifiedKernel(manifest, self._core.tree.path(kernel.kernel_ref), verdict)

    def signed(self, kernel: CompiledKernelArtifact, fingerprint: str = "") -> KernelManifest:
        """Check everything but the verdict: that the files are those which Tezzeret signed last.

        Raises:
            TrustError: one of the checks failed.
        """
        with self._core.tree.opened(kernel.kernel_ref) as folder:
            found = names(folder)
            statement = _statement(read_file(folder, SIGNATURE))
            self.check(statement, kernel, Role.TEZZERET)
            text = read_file(folder, MANIFEST)
            if sha256(text) != statement.artifact_hash or statement.artifact_hash != kernel.kernel_ref:
                raise BadHash(f"{MANIFEST} of {kernel.id} is not what Tezzeret signed; compile the kernel anew.")
            manifest = _manifest(kernel.id, text, fingerprint)
            _check_files(kernel.id, folder, manifest, found)
        return manifest

    def check(self, statement: Attestation, kernel: CompiledKernelArtifact, role: Role) -> None:
        """Check a statement that is in force: signature, role, subject, and that it is the latest one.

        Raises:
            WrongRole: somebody else says it, or the role may not say it.
            BadSignature: it is not signed, about something else, or unknown to the records.
            StaleManifest: the role has said something since.
        """
        if statement.role is not role:
            raise WrongRole(f"The statement about {kernel.id} is by {statement.role}; it must be by {role}.")
        self._core.keys.check(statement)
        if statement.kernel_artifact_id != kernel.id:
            raise BadSignature(f"The statement is about {statement.kernel_artifact_id!r}, not about {kernel.id!r}.")
        latest = self.latest(kernel.id, role)
        if statement.serial < latest:
            raise StaleManifest(f"{role} said {statement.serial} of {kernel.id} and {latest} since; the older is void.")
        if statement.serial > latest:
            raise BadSignature(
                f"{role} has said up to {latest} of {kernel.id}; the records know no {statement.serial}."
            )

    def latest(self, kernel_id: str, role: Role) -> int:
        """Return the greatest serial of a role's statements about a kernel; it never goes back within a process."""
        key = kernel_id, role
        self._seen[key] = max(self._seen.get(key, 0), self._core.records.number(mark(kernel_id, role)))
        return self._seen[key]

    def _verdict(self, kernel: CompiledKernelArtifact) -> Attestation:
        verdict = self._core.records.attestations.get(f"{kernel.id}/{Role.URABRASK}")
        if verdict is None:
            raise BadSignature(f"Kernel {kernel.id} is VALIDATED without a verdict of Urabrask; have it judged.")
        self.check(verdict, kernel, Role.URABRASK)
        if verdict.status is not ArtifactStatus.VALIDATED:
            raise WrongRole(f"Urabrask says that {kernel.id} is {verdict.status}; somebody else says VALIDATED.")
        if verdict.artifact_hash != kernel.kernel_ref:
            raise BadHash(f"Urabrask judged {verdict.artifact_hash[:12]} of {kernel.id}, not {kernel.kernel_ref[:12]}.")
        return verdict


def mark(kernel_id: str, role: Role) -> str:
    """Return the name of the record that holds the greatest serial of a role's statements about a kernel.

    Example:
        >>> mark("k", Role.URABRASK)
        'mark/k/urabrask'
    """
    return f"mark/{kernel_id}/{role}"


def alert_of(error: TrustError, subject: str) -> SecurityAlert:
    """Return the event that says which check failed.

    Example:
        >>> alert_of(BadHash("a flipped byte"), "k").violation.value
        'HASH'
    """
    violation = Violation.PERMISSION
    for kind, meant in (
        (BadSignature, Violation.SIGNATURE),
        (BadHash, Violation.HASH),
        (WrongFingerprint, Violation.FINGERPRINT),
    ):
        if isinstance(error, kind):
            violation = meant
    return SecurityAlert(source="urza", subject=subject, violation=violation, detail=f"{type(error).__name__}: {error}")


def _statement(text: bytes) -> Attestation:
    try:
        return parse(Attestation, text)
    except ContractError as error:
        raise BadSignature(f"{SIGNATURE} is no statement: {error}") from error


def _manifest(kernel_id: str, text: bytes, fingerprint: str) -> KernelManifest:
    manifest = parse(KernelManifest, text)
    if manifest.kernel_id != kernel_id:
        raise BadSignature(f"The folder of {kernel_id!r} holds the signed manifest of {manifest.kernel_id!r}.")
    if fingerprint and manifest.fingerprint and fingerprint != manifest.fingerprint:
        raise WrongFingerprint(
            f"{kernel_id} needs the binary interface {manifest.fingerprint[:12]}; this process has {fingerprint[:12]}."
        )
    return manifest


def _check_files(kernel_id: str, folder: int, manifest: KernelManifest, found: set[str]) -> None:
    """Raise unless the folder holds the manifest's files, each with its hash, and nothing else."""
    expected = {*manifest.files, MANIFEST, SIGNATURE}
    if found != expected:
        differing = ", ".join(sorted(found ^ expected))
        raise BadHash(f"The folder of {kernel_id} has other files than its manifest: {differing[:200]}; compile anew.")
    for name, digest in manifest.files.items():
        if hash_file(folder, name) != digest:
            raise BadHash(f"File {name!r} of {kernel_id} differs from its hash; compile the kernel anew.")
