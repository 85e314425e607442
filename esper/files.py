"""Files and folders that are either whole or not there, whenever the process that writes them is killed."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_SUFFIX = ".part"


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends well; otherwise nothing has happened.

    Args:
        path: the target; its folder is made if it does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/a.txt") as file:
        ...         _ = file.write(b"whole")
        ...     Path(f"{folder}/a.txt").read_text()
        'whole'
    """
    target = Path(path)
    part = part_of(target)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(target.parent)


def part_of(target: Path) -> Path:
    """Return a name beside a target for what is to take its place.

    The folder of both is made if it does not exist; what writers that failed or were killed left in it is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    part = target.parent / f".{target.name}.{socket.gethostname()}.{os.getpid()}{_SUFFIX}"
    _remove(part)
    return part


def put_in_place(part: Path, target: Path) -> None:
    """Let a finished folder take the place of `target`, which may be a file, a folder, or not there.

    Two folders cannot change places at once. So the old one first steps aside under a name of the same suffix: after a
    kill at any moment a whole one is there, under the one name or the other.
    """
    aside = target.with_name(f"{target.stem}-replaced{target.suffix}")
    if target.exists():
        _discard(aside)
        target.rename(aside)
    part.rename(target)
    sync_folder(target.parent)
    _discard(aside)


def _discard(path: Path) -> None:
    """Remove a file or folder; what a kill leaves of it has another name."""
    if path.exists():
        part = part_of(path)
        path.rename(part)
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the renaming itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what writers that were killed on this machine left behind."""
    for part in folder.glob(f".*.{socket.gethostname()}.*{_SUFFIX}"):
        number = part.name.removesuffix(_SUFFIX).rpartition(".")[2]
        if number.isdigit() and not _runs(int(number)):
            _remove(part)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
