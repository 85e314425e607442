"""The run's own record: events and field reports as JSON lines."""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from esper.files import replacing
from esper.leyline.base import Message
from esper.leyline.codec import to_json
from esper.leyline.errors import OutputError
from esper.leyline.reports import FieldReport

EVENTS, REPORTS = "events.jsonl", "fieldreports.jsonl"
_TAIL = 1 << 16
"""Bytes before a cursor that are searched for the line before it."""


class Journal:
    """Appends every event to `events.jsonl` and every field report to `fieldreports.jsonl`.

    Args:
        folder: where; made if it does not exist.
        cursor: where a resumed run stood, as `cursor` returned it; what the run wrote after that is dropped, since it
            will be written again.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, cursor: Mapping[str, Any] | None = None) -> None:
        """Open both files."""
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if cursor is not None:
                for name in (EVENTS, REPORTS):
                    offset, checksum = cursor[name]
                    _rewind(self.folder / name, offset, checksum, cursor["run_id"])
            self._events: BinaryIO = (self.folder / EVENTS).open("ab")
            self._reports: BinaryIO = (self.folder / REPORTS).open("ab")
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.folder}: {error.strerror or error}; choose another output folder."
            ) from error

    def write(self, message: Message) -> None:
        """Append one message and flush, so that a killed run loses nothing."""
        file = self._reports if isinstance(message, FieldReport) else self._events
        file.write(to_json(message).encode() + b"\n")
        file.flush()

    def cursor(self, run_id: str) -> dict[str, Any]:
        """Return where both files end now, as plain data.

        Args:
            run_id: the run that writes.
        """
        return {"run_id": run_id} | {name: list(_end(self.folder / name)) for name in (EVENTS, REPORTS)}

    def close(self) -> None:
        """Close both files; may be called twice."""
        self._events.close()
        self._reports.close()


def _end(path: Path) -> tuple[int, int | None]:
    """Return the length of a file, and the checksum of its last line."""
    size = path.stat().st_size if path.exists() else 0
    return size, _checksum_before(path, size) if size else 0


def _checksum_before(path: Path, offset: int) -> int | None:
    """Return the checksum of the line that ends at an offset; None where no line ends."""
    with path.open("rb") as file:
        file.seek(max(0, offset - _TAIL))
        before = file.read(min(offset, _TAIL))
    if not before.endswith(b"\n"):
        return None
    return zlib.crc32(before[:-1].rpartition(b"\n")[2])


def _rewind(path: Path, offset: int, checksum: int, run_id: str) -> None:
    """Drop what a run wrote after a cursor, and a line that a kill cut short; lines of other runs stay.

    A file in which the cursor points to no such line is another folder's: it is left as it is.
    """
    size = path.stat().st_size if path.exists() else 0
    if size <= offset or (offset and _checksum_before(path, offset) != checksum):
        return
    with path.open("rb") as file:
        file.seek(offset)
        tail = file.read()
    kept = b"".join(line for line in tail.splitlines(keepends=True) if _is_of_another(line, run_id))
    if not kept:
        os.truncate(path, offset)
        return
    with path.open("rb") as file, replacing(path) as new:
        new.write(file.read(offset) + kept)


def _is_of_another(line: bytes, run_id: str) -> bool:
    try:
        return line.endswith(b"\n") and bool(json.loads(line)["run_id"] != run_id)
    except (ValueError, KeyError, TypeError):
        return False
