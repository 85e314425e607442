"""Keys and signatures: one Ed25519 pair per role, and who may say what."""

import os
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Final, Self, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from filelock import FileLock, Timeout

from esper.files import replacing
from esper.leyline.artifacts import Attestation, Role
from esper.leyline.errors import BadSignature, StoreError, TrustError, WrongRole
from esper.leyline.kernels import ArtifactStatus
from esper.urza.canonical import canonical

MAY_SAY: Final = {
    Role.TEZZERET: frozenset({ArtifactStatus.COMPILING, ArtifactStatus.INVALID, ArtifactStatus.PENDING_BENCHMARKING}),
    Role.URABRASK: frozenset({ArtifactStatus.VALIDATED, ArtifactStatus.REJECTED}),
    Role.KARN: frozenset({ArtifactStatus.UNVALIDATED}),
}
"""Which statuses a role may vouch for."""

_PATIENCE_S: Final = 10.0
_KEY_BYTES: Final = 32


@final
class KeyRing:
    """The keys of every role, in a folder that is no part of any store.

    Args:
        folder: where the keys are; missing pairs are made, private files with mode 0600.
        private: whether to make and read private keys; a reader needs none.

    Raises:
        TrustError: a private file can be read by others, or a pair does not match.
        StoreError: a key is missing or damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     signature = KeyRing(folder).sign(Role.KARN, b"a blueprint")
        ...     KeyRing.public_only(folder).verify(Role.KARN, b"a blueprint", signature)
    """

    def __init__(self, folder: str | Path, *, private: bool = True) -> None:
        """Make what is missing, and read."""
        self.folder = Path(folder)
        self._private: dict[Role, Ed25519PrivateKey] = {}
        if private:
            self._private = self._own()
        self._public = {role: self._read_public(role) for role in Role}
        for role, key in self._private.items():
            if key.public_key().public_bytes_raw() != self._public[role].public_bytes_raw():
                raise TrustError(f"{self._path(role, 'pub')} does not belong to {self._path(role, 'key')}; remove one.")

    @classmethod
    def public_only(cls, folder: str | Path) -> Self:
        """Read the public keys alone: enough to verify, not to sign."""
        return cls(folder, private=False)

    def sign(self, role: Role, data: bytes) -> bytes:
        """Sign bytes as a role.

        Raises:
            WrongRole: its private key is not here.
        """
        if role not in self._private:
            raise WrongRole(
                f"No private key of {role} is here; only its holder may sign, this ring reads {self.folder}."
            )
        return self._private[role].sign(data)

    def verify(self, role: Role, data: bytes, signature: bytes) -> None:
        """Check that a role has signed these bytes.

        Raises:
            BadSignature: it has not.
        """
        try:
            self._public[role].verify(signature, data)
        except InvalidSignature:
            raise BadSignature(
                f"{len(signature)} bytes are no signature of {role} under these {len(data)} bytes."
            ) from None

    def attest(self, statement: Attestation) -> Attestation:
        """Return the statement, signed by the role that it names.

        Raises:
            WrongRole: the role may not say this, or its private key is not here.
        """
        _check_role(statement)
        return statement.model_copy(update={"signature": self.sign(statement.role, _unsigned(statement))})

    def check(self, statement: Attestation) -> None:
        """Check a statement: its role may say this, and has signed it.

        Raises:
            WrongRole: the role may not say this.
            BadSignature: it has not signed it.
        """
        _check_role(statement)
        self.verify(statement.role, _unsigned(statement), statement.signature)

    def _path(self, role: Role, kind: str) -> Path:
        return self.folder / f"{role}.{kind}"

    def _own(self) -> dict[Role, Ed25519PrivateKey]:
        """Read the private keys; make those that are missing."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with FileLock(self.folder / ".lock", timeout=_PATIENCE_S):
                return {role: self._read_private(role) for role in Role}
        except Timeout:
            raise StoreError(f"{self.folder} has been locked by another process for {_PATIENCE_S:.0f} s.") from None

    def _read_private(self, role: Role) -> Ed25519PrivateKey:
        path = self._path(role, "key")
        if not path.exists():
            _write(path, Ed25519PrivateKey.generate().private_bytes_raw(), 0o600)
        if path.stat().st_mode & 0o077:
            raise TrustError(f"{path} can be read by others; give it mode 0600, and make new keys if it was copied.")
        key = Ed25519PrivateKey.from_private_bytes(_read(path))
        if not self._path(role, "pub").exists():
            _write(self._path(role, "pub"), key.public_key().public_bytes_raw(), 0o644)
        return key

    def _read_public(self, role: Role) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(_read(self._path(role, "pub")))


def _check_role(statement: Attestation) -> None:
    if statement.status not in MAY_SAY[statement.role]:
        allowed, subject = ", ".join(sorted(MAY_SAY[statement.role])), statement.kernel_artifact_id
        raise WrongRole(f"{statement.role} may not say that {subject} is {statement.status}; it may say {allowed}.")


def _unsigned(statement: Attestation) -> bytes:
    return canonical(statement.model_copy(update={"signature": b""}))


def _write(path: Path, key: bytes, mode: int) -> None:
    with replacing(path) as file:
        os.fchmod(file.fileno(), mode)
        file.write(b64encode(key) + b"\n")


def _read(path: Path) -> bytes:
    try:
        key = b64decode(path.read_bytes(), validate=False)
    except (OSError, ValueError) as error:
        raise StoreError(f"key {path} cannot be read: {error}; copy it from where the keys were made.") from error
    if len(key) != _KEY_BYTES:
        raise StoreError(f"key {path} holds {len(key)} bytes, not {_KEY_BYTES}; copy it from where the keys were made.")
    return key
