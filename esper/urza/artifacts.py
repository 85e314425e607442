"""The tree of artifacts: one folder per content hash, written whole or not at all, and read only after a check.

`artifacts/ab/<sha256 of manifest.json>/` holds `manifest.json`, `manifest.sig` and the files that the manifest names.
"""

import hashlib
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, final
from uuid import uuid4

from esper.leyline.errors import BadHash, StoreError, UnsafePath

MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
MAX_ARTIFACT: Final = 64 * 2**20
"""Largest artifact, in bytes."""
MAX_FILES: Final = 32
"""Most files of an artifact."""
MAX_MANIFEST: Final = 2**20
"""Longest manifest, in bytes."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_REF = re.compile(r"[0-9a-f]{64}")
_PART: Final = ".part-"
_CHUNK: Final = 1 << 16


def check_name(name: str) -> str:
    """Return a name of a file or kernel that stays in its folder.

    Raises:
        UnsafePath: it might not.

    Example:
        >>> check_name("fw.so")
        'fw.so'
    """
    if not _NAME.fullmatch(name):
        raise UnsafePath(f"{name[:80]!r} is no name of a file or kernel; use letters, digits, '.', '_' and '-'.")
    return name


@final
class ArtifactTree:
    """Folders by content hash.

    Args:
        root: folder of the tree; it is made with mode 0700.

    Example:
        >>> import tempfile
        >>> from esper.urza.canonical import sha256
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tree = ArtifactTree(folder)
        ...     path = tree.write(sha256(b"{}"), {"manifest.json": b"{}"})
        ...     with tree.opened(path.name) as handle:
        ...         read_file(handle, "manifest.json")
        b'{}'
    """

    def __init__(self, root: str | Path) -> None:
        """Make the root."""
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, ref: str) -> Path:
        """Return the folder of a content hash, whether it exists or not.

        Raises:
            UnsafePath: the text is no hash.
        """
        if not _REF.fullmatch(ref):
            raise UnsafePath(f"{ref[:80]!r} is no content hash; expected 64 hexadecimal digits.")
        return self.root / ref[:2] / ref

    def write(self, ref: str, files: Mapping[str, bytes]) -> Path:
        """Write an artifact: after a crash at any moment it is there whole, or not at all.

        Raises:
            UnsafePath: a name leaves the folder.
            StoreError: there is too much of it, or the disk is full.
        """
        target = self.path(ref)
        _check_size(files)
        part = self.root / f"{_PART}{socket.gethostname()}-{os.getpid()}-{uuid4().hex}"
        try:
            part.mkdir(mode=0o700)
            for name, data in files.items():
                _write_file(part / check_name(name), data)
            _sync(part)
            target.parent.mkdir(mode=0o700, exist_ok=True)
            _settle(part, target)
            _sync(target.parent)
        except OSError as error:
            raise StoreError(f"Artifact {ref[:12]} cannot be written: {error}; nothing was changed.") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return target

    @contextmanager
    def opened(self, ref: str) -> Iterator[int]:
        """Open an artifact's folder, following no link on the way.

        Yields:
            A handle of the folder.

        Raises:
            UnsafePath: a link is in the way, or others may write there.
            BadHash: there is no such artifact.
        """
        path = self.path(ref)
        handles: list[int] = []
        try:
            for step in (self.root, path.parent.name, path.name):
                handles.append(_open_folder(step, handles[-1] if handles else None))
            yield handles[-1]
        finally:
            for handle in handles:
                os.close(handle)

    def refs(self) -> list[str]:
        """Return the hashes of all artifacts, sorted."""
        return sorted(path.name for path in self.root.glob("??/*") if _REF.fullmatch(path.name))

    def size(self, ref: str) -> int:
        """Return the bytes of an artifact; 0 if there is none, or another writer removes it meanwhile."""
        try:
            with os.scandir(self.path(ref)) as entries:
                return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def age_s(self, ref: str) -> float:
        """Return the age of an artifact's folder, in seconds; 0 if there is none."""
        try:
            return time.time() - self.path(ref).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def remove(self, ref: str) -> None:
        """Remove an artifact's folder, after it was archived; a half removed one is no longer under its name."""
        path = self.path(ref)
        if path.is_dir() and not path.is_symlink():
            part = self.root / f"{_PART}{socket.gethostname()}-{os.getpid()}-{uuid4().hex}"
            # Another writer may have removed it since.
            with suppress(FileNotFoundError):
                path.rename(part)
                shutil.rmtree(part)

    def sweep(self) -> int:
        """Remove what writers that were killed on this machine left unfinished; return how many folders that was."""
        dead = [part for part in self.root.glob(f"{_PART}{socket.gethostname()}-*") if not _runs(part.name)]
        for part in dead:
            shutil.rmtree(part, ignore_errors=True)
        return len(dead)


def names(folder: int) -> set[str]:
    """Return the names in an opened folder.

    Raises:
        UnsafePath: one of them is a link or no plain file.
    """
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        if not entry.is_file(follow_symlinks=False):
            raise UnsafePath(f"{entry.name!r} in an artifact is a link or no plain file; remove it and compile anew.")
    return {entry.name for entry in found}


def read_file(folder: int, name: str, limit: int = MAX_MANIFEST) -> bytes:
    """Return a small file of an opened folder.

    Raises:
        UnsafePath: it is a link, or its name leaves the folder.
        BadHash: it is missing, or longer than `limit` bytes.
    """
    handle = _open_file(folder, name, limit)
    with os.fdopen(handle, "rb") as file:
        return file.read(limit + 1)


def hash_file(folder: int, name: str, limit: int = MAX_ARTIFACT) -> str:
    """Return the SHA-256 of a file of an opened folder, read piece by piece; errors are those of `read_file`."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with os.fdopen(_open_file(folder, name, limit), "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _open_folder(step: str | Path, parent: int | None) -> int:
    """Open a folder below an open one; it belongs to us, and nobody else may write there."""
    try:
        handle = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except FileNotFoundError as error:
        raise BadHash(f"Artifact folder {Path(step).name[:12]} is missing; compile the kernel anew.") from error
    except OSError as error:
        raise UnsafePath(f"{step} is a link or no folder of ours: {error}; remove it and compile anew.") from error
    status = os.fstat(handle)
    if status.st_mode & 0o022 or status.st_uid != os.geteuid():
        os.close(handle)
        raise UnsafePath(f"{step} can be written by others; give it mode 0700 and compile anew.")
    return handle


def _open_file(folder: int, name: str, limit: int) -> int:
    try:
        handle = os.open(check_name(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError as error:
        raise BadHash(f"File {name!r} of the artifact is missing; compile the kernel anew.") from error
    except OSError as error:
        raise UnsafePath(f"File {name!r} of the artifact cannot be opened safely: {error}.") from error
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
        return handle
    os.close(handle)
    raise BadHash(f"File {name!r} of the artifact has {status.st_size} bytes; a plain file of at most {limit} is read.")


def _settle(part: Path, target: Path) -> None:
    """Give a written folder its name, unless one of the same content has it already."""
    try:
        if not target.exists():
            part.rename(target)
    except OSError:
        # Another writer was faster; what has this name has this content.
        if not target.exists():
            raise


def _check_size(files: Mapping[str, bytes]) -> None:
    size, manifest = sum(map(len, files.values())), len(files.get(MANIFEST, b""))
    if size > MAX_ARTIFACT or len(files) > MAX_FILES or manifest > MAX_MANIFEST:
        raise StoreError(
            f"An artifact of {len(files)} files, {size} bytes and a manifest of {manifest} is too large; "
            f"at most {MAX_FILES}, {MAX_ARTIFACT} and {MAX_MANIFEST}."
        )


def _write_file(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _runs(part: str) -> bool:
    """Whether the process that makes this unfinished folder is alive."""
    try:
        os.kill(int(part.split("-")[-2]), 0)
    except (ProcessLookupError, ValueError, IndexError):
        return False
    except OSError:
        return True
    return True
