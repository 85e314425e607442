"""The ledger: what was done to whom, by which role, as an append-only file in which every line hashes the one before.

A line is the canonical JSON of an `Entry`. Its `hash` covers all its other fields, `previous` among them, so that no
line can be changed, left out or put in without breaking the chain. Where the chain ends is kept in the records, so
that a ledger cut short is noticed as well.

A change appends its lines first and commits its records after. A process killed in between leaves lines of a change
that never happened: the next writer moves them aside into a file of their own, and says so in a line.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, final

from filelock import FileLock, Timeout
from pydantic import Field

from esper.files import replacing
from esper.leyline.base import Message
from esper.leyline.errors import ContractError, StoreError
from esper.urza.canonical import canonical, canonical_text, parse, sha256
from esper.urza.records import Head

_PATIENCE_S: Final = 30.0
_POLL_S: Final = 0.005
_LONGEST: Final = 4096


class Entry(Message):
    """One line of the ledger.

    Args:
        sequence: place in the ledger, from 1.
        change: sequence of the first entry of the same change.
        time: seconds since the Unix epoch.
        role: who did it; empty for the store itself.
        action: what was done, e.g. `status`, `alert`, `recovered`.
        subject: to which blueprint or kernel.
        before: status before; empty for none.
        after: status after; empty for none.
        detail: one sentence for people.
        previous: hash of the entry before; empty for the first.
        hash: SHA-256 of the canonical JSON of the line without it.
    """

    sequence: int = Field(ge=1)
    change: int = Field(ge=1)
    time: float = Field(ge=0.0)
    role: str = ""
    action: str
    subject: str = ""
    before: str = ""
    after: str = ""
    detail: str = ""
    previous: str = ""
    hash: str = ""


class Note(NamedTuple):
    """What is to be written down; see `Entry`."""

    role: str
    action: str
    subject: str = ""
    before: str = ""
    after: str = ""
    detail: str = ""


@final
class Ledger:
    """An append-only, hash-chained file.

    Args:
        path: the file; it is made with the first entry.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ledger = Ledger(f"{folder}/ledger.jsonl")
        ...     with ledger.locked():
        ...         head = ledger.append(Head(), [Note("karn", "submit", "a blueprint")])
        ...     ledger.verify(head)
        []
    """

    def __init__(self, path: str | Path) -> None:
        """Remember where."""
        self.path = Path(path)
        self._lock = FileLock(self.path.with_suffix(".lock"), timeout=_PATIENCE_S)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other writer out, in this process and in others.

        Raises:
            StoreError: somebody else has held the lock for too long.
        """
        try:
            with self._lock.acquire(poll_interval=_POLL_S):
                yield
        except Timeout as error:
            raise StoreError(
                f"{self.path} was locked by another process for {_PATIENCE_S:.0f} s; try again."
            ) from error

    def append(self, head: Head, notes: Sequence[Note]) -> Head:
        """Write the entries of one change, durably; call it under the lock.

        Returns:
            The new end.

        Raises:
            StoreError: the disk is full, or the file cannot be written.
        """
        entries = list(_chained(head, notes))
        data = b"".join(canonical(entry) + b"\n" for entry in entries)
        try:
            _write(self.path, head.size, data)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {error}; nothing was changed.") from error
        return Head(sequence=entries[-1].sequence, hash=entries[-1].hash, size=head.size + len(data))

    def settle(self, head: Head) -> str:
        """Move aside what a killed writer left after the end; call it under the lock.

        Returns:
            One sentence that says what was moved where; empty when nothing was.

        Raises:
            StoreError: the file is shorter than it was, or goes on with more than one unfinished change.
        """
        surplus = self._size() - head.size
        if surplus == 0:
            return ""
        if surplus < 0:
            raise StoreError(
                f"{self.path} lacks {-surplus} of its {head.size} bytes: it was cut. Nothing is written until somebody "
                "has looked: put the file back, or give the chain a new start with `Urza.restart_ledger`."
            )
        with self.path.open("rb") as file:
            file.seek(head.size)
            tail = file.read()
        self._check_unfinished(head, tail)
        return self._move_aside(head, tail)

    def restart(self) -> str:
        """Move a broken ledger aside, so that a new chain begins; call it under the lock.

        Returns:
            Name and SHA-256 of the file that it was moved to.
        """
        data = self.path.read_bytes() if self.path.exists() else b""
        aside = self._aside("broken")
        with replacing(aside) as file:
            file.write(data)
        self.path.unlink(missing_ok=True)
        return f"{aside.name} (SHA-256 {sha256(data)})"

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """Yield the entries from a byte offset on, which is that of an entry; those of an unfinished change as well.

        Raises:
            StoreError: a line is damaged.
        """
        for number, line in enumerate(self._lines(start), start=1):
            try:
                yield parse(Entry, line)
            except ContractError as error:
                raise StoreError(f"{self.path}: line {number} from byte {start} is damaged: {error}") from error

    def verify(self, head: Head) -> list[str]:
        """Return what is wrong with the chain: nothing, when the list is empty.

        Args:
            head: where the records say that it ends.
        """
        with self.locked():
            return list(self._problems(head))

    def _problems(self, head: Head) -> Iterator[str]:
        last = Head()
        for number, line in enumerate(self._lines(0), start=1):
            if last.size >= head.size:
                break
            problem, last = _link(last, line)
            if problem:
                yield f"line {number} {problem}"
        if last != head:
            yield (
                f"it ends after {last.sequence} entries and {last.size} bytes ({last.hash[:12] or 'empty'}), "
                f"the records say {head.sequence} and {head.size} ({head.hash[:12] or 'empty'})"
            )
        elif self._size() > head.size:
            yield f"{self._size() - head.size} bytes follow its end; the next writer moves aside what a killed one left"

    def _lines(self, start: int) -> Iterator[bytes]:
        """Yield the lines with their ends."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(start)
            yield from file

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _check_unfinished(self, head: Head, tail: bytes) -> None:
        """Raise unless the tail is what one killed writer may leave: the lines of one change, the last one torn."""
        last, change = head, head.sequence + 1
        for line in tail.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return
            problem, last = _link(last, line)
            if problem or parse(Entry, line).change != change:
                raise StoreError(
                    f"{self.path} goes on {len(tail)} bytes after the end that the records know, with more than one "
                    "unfinished change: the records were put back, or the ledger was written to by somebody else. "
                    "Put both back, or give the chain a new start with `Urza.restart_ledger`."
                )

    def _move_aside(self, head: Head, tail: bytes) -> str:
        aside = self._aside(f"torn-{head.sequence}")
        try:
            with replacing(aside) as file:
                file.write(tail)
            with self.path.open("r+b") as file:
                file.truncate(head.size)
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(f"{self.path} cannot be repaired after a crash: {error}; make room.") from error
        return f"{len(tail)} bytes of an unfinished change were moved to {aside.name}"

    def _aside(self, why: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{why}-{time.time_ns()}.jsonl")


def _write(path: Path, size: int, data: bytes) -> None:
    """Write behind the present end, all or nothing."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        written = 0
        while written < len(data):
            written += os.write(handle, data[written:])
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, size)
        raise
    finally:
        os.close(handle)


def _chained(head: Head, notes: Sequence[Note]) -> Iterator[Entry]:
    """Turn notes into entries that continue the chain."""
    previous, change = head.hash, head.sequence + 1
    for sequence, note in enumerate(notes, start=change):
        fields = note._replace(detail=note.detail[:_LONGEST])._asdict()
        entry = Entry(sequence=sequence, change=change, time=time.time(), previous=previous, **fields)
        previous = _hash(json.loads(canonical(entry)))
        yield entry.model_copy(update={"hash": previous})


def _hash(fields: dict[str, Any]) -> str:
    return sha256(canonical_text({name: value for name, value in fields.items() if name != "hash"}))


def _link(last: Head, line: bytes) -> tuple[str, Head]:
    """Return what is wrong with a line that should follow `last`, and the end after it."""
    size = last.size + len(line)
    try:
        fields = json.loads(line)
        end = Head(sequence=fields["sequence"], hash=fields["hash"], size=size)
        as_written, digest = canonical_text(fields) + b"\n", _hash(fields)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        return f"is damaged: {error}", last.model_copy(update={"size": size})
    if as_written != line:
        return "is not as it was written", end
    if end.hash != digest:
        return "has been changed: its hash does not fit", end
    if fields.get("previous") != last.hash or end.sequence != last.sequence + 1:
        return "does not follow from the one before", end
    return "", end
