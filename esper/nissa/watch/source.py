"""Where the files of a watched run come from, and a tail that reads only what is new."""

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final, NamedTuple, final

from esper.leyline.errors import ConfigError, ContractError
from esper.nissa.watch import live

EVENTS: Final = "events.jsonl"
REPORTS: Final = "fieldreports.jsonl"
SUMMARY: Final = "growth.json"
FILES: Final = (EVENTS, REPORTS, SUMMARY, live.FILE)
"""The files of a run that can be watched; no other is ever read."""

PIECE: Final = 2**20
"""Most bytes that are read at once."""

_CHECK = 256
"""Bytes before the place of a tail that must still be there when it goes on."""


class Mark(NamedTuple):
    """Size of a file in bytes, and a number that changes with its content."""

    size: int
    stamp: int


class Listing(NamedTuple):
    """What a source has now.

    Args:
        clock: its time, in seconds since the Unix epoch.
        files: mark of each file there is.
    """

    clock: float
    files: dict[str, Mark]


class Source(ABC):
    """The files of one run."""

    name: str
    """What is watched, for people."""

    @abstractmethod
    def look(self) -> Listing:
        """Return what is there.

        Raises:
            BusError: nobody answers.
        """

    @abstractmethod
    def read(self, file: str, offset: int, size: int) -> bytes:
        """Return bytes of a file, fewer where it ends; nothing where it is gone.

        Args:
            file: one of `FILES`.
            offset: from this byte on.
            size: at most so many, up to `PIECE`.

        Raises:
            BusError: nobody answers.
            ContractError: it is none of these files.
        """

    def close(self) -> None:  # noqa: B027 - a folder holds nothing
        """Let go of what is held."""


@final
class Folder(Source):
    """The folder of a run on this machine.

    Args:
        path: the folder; its files may come later.

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(self, path: str | Path) -> None:
        """Check that there is a folder."""
        self.path, self.name = Path(path), str(path)
        if not self.path.is_dir():
            raise ConfigError(f"{path} is no folder; give the one that a run writes, e.g. outputs/demo/RUN.")

    def look(self) -> Listing:
        """Return what is there."""
        found = {file: mark for file in FILES if (mark := self._mark(file)) is not None}
        return Listing(time.time(), found)

    def _mark(self, file: str) -> Mark | None:
        try:
            told = (self.path / file).stat()
        except OSError:
            return None
        return Mark(told.st_size, (told.st_mtime_ns ^ told.st_ino) % 2**63)

    def read(self, file: str, offset: int, size: int) -> bytes:
        """Return bytes of a file."""
        if file not in FILES or offset < 0 or not 0 <= size <= PIECE:
            raise ContractError(f"{file!r} from byte {offset}, {size} bytes, is not to be watched.")
        try:
            with (self.path / file).open("rb") as opened:
                opened.seek(offset)
                return opened.read(size)
        except OSError:
            return b""


def read_whole(source: Source, file: str, size: int) -> bytes:
    """Return a whole file of a known size."""
    found = b""
    while piece := source.read(file, len(found), min(PIECE, size - len(found))):
        found += piece
    return found


@final
class Tail:
    r"""The lines of a growing file, each read once.

    A line that is not finished yet is waited for. A file that was cut, or replaced by another, is started over.

    Args:
        source: where it is.
        file: which.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "events.jsonl")
        ...     _ = file.write_text("one\ntw")
        ...     tail = Tail(Folder(folder), "events.jsonl")
        ...     tail.read()
        [b'one']
    """

    def __init__(self, source: Source, file: str) -> None:
        """Stand at the beginning."""
        self._source, self._file = source, file
        self._mark: Mark | None = None
        self._place, self._check = 0, b""
        self.restarted = False

    def read(self, listing: Listing | None = None) -> list[bytes]:
        """Return the lines that are new; `restarted` then tells whether they are the first ones of a new file.

        Args:
            listing: what the source has; None has it looked.
        """
        mark = (listing if listing is not None else self._source.look()).files.get(self._file)
        self.restarted = False
        if mark == self._mark:
            return []
        fresh = mark is None or mark.size < self._place or not self._goes_on()
        lines = self._new_lines(*((0, b"") if fresh else (self._place, self._check)))
        self._mark, self.restarted = mark, fresh
        return lines

    def _goes_on(self) -> bool:
        """Whether what was read last is still where it was."""
        start = self._place - len(self._check)
        return self._source.read(self._file, start, len(self._check)) == self._check

    def _new_lines(self, place: int, check: bytes) -> list[bytes]:
        found, rest = [], b""
        while piece := self._source.read(self._file, place + len(rest), PIECE):
            whole, end, rest = (rest + piece).rpartition(b"\n")
            found += whole.split(b"\n") if end else []
            place += len(whole + end)
            check = (check + whole + end)[-_CHECK:]
        # Only now: a source that stops answering halfway is read again from the old place.
        self._place, self._check = place, check
        return found
