"""Checkpoint folders of a sharded host (FSDP2), known as whole by the checksums of their files.

```
__<rank>_<n>.distcp   each rank's tensors          } written by torch
.metadata             where in them a tensor is    }
meta.pt               everything that is no tensor of the host or of its optimizer
checksums.json        size and SHA-256 of every other file; written last
```
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from esper.files import replacing, sync_folder
from esper.leyline.errors import CheckpointError

META = "meta.pt"
CHECKSUMS = "checksums.json"

_BLOCK = 1 << 20

Checksums = dict[str, list[int | str]]
"""Size in bytes and SHA-256 of each file, by its name."""


def is_checkpoint_folder(path: Path) -> bool:
    """Return whether a folder is a checkpoint itself, whole or not, and no folder of checkpoints."""
    return any((path / name).is_file() for name in (META, CHECKSUMS))


def written_at(path: Path) -> int:
    """Return when a checkpoint, file or folder, was finished, in nanoseconds."""
    # A folder's own time changes with every file that comes or goes.
    last = next((path / name for name in (CHECKSUMS, META) if (path / name).is_file()), path)
    return last.stat().st_mtime_ns


def checksums_of(files: Iterable[Path]) -> Checksums:
    """Return size and SHA-256 of files that are on the disk when this returns."""
    return {file.name: _checksum(file) for file in files}


def _checksum(file: Path) -> list[int | str]:
    sha, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        while block := stream.read(_BLOCK):
            sha.update(block)
            size += len(block)
    return [size, sha.hexdigest()]


def seal(folder: Path, known: Mapping[str, list[int | str]]) -> None:
    """Write down what a finished folder holds.

    Args:
        folder: the folder.
        known: checksums that were taken already; those of all other files are taken here.
    """
    rest = (file for file in sorted(folder.iterdir()) if file.name not in known and file.name != CHECKSUMS)
    found = dict(known) | checksums_of(rest)
    with replacing(folder / CHECKSUMS) as file:
        file.write(json.dumps(found, indent=1, sort_keys=True).encode())
    sync_folder(folder)


def is_sealed(folder: Path) -> bool:
    """Return whether a folder tells what it must hold; one that Esper did not write does not."""
    return (folder / CHECKSUMS).is_file()


def require_whole(folder: Path) -> None:
    """Check every file of a checkpoint folder; one without checksums is only looked at for `meta.pt`.

    Raises:
        CheckpointError: a file is missing, cut short or changed.
    """
    if not (folder / META).is_file():
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no {META}; use another checkpoint.")
    if not is_sealed(folder):
        return
    for name, expected in _sealed(folder).items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} is not a whole checkpoint: {name} is missing; use another checkpoint.")
        if file.stat().st_size != expected[0] or _checksum(file) != expected:
            raise CheckpointError(f"{folder} is damaged: {name} is not what was saved; use another checkpoint.")


def _sealed(folder: Path) -> Checksums:
    try:
        found: Checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        if META in found and all(len(entry) == 2 and Path(name).name == name for name, entry in found.items()):
            return found
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / CHECKSUMS} cannot be read: {error}; use another checkpoint.") from error
    raise CheckpointError(f"{folder / CHECKSUMS} makes no sense; use another checkpoint.")
