"""The journal: every letter that must not be lost, and what each group still has to acknowledge, in SQLite."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, final

from esper.leyline.envelope import Priority
from esper.leyline.errors import BusError

_VERSION = 1
_PAGE = 500
_TABLES = """
CREATE TABLE letters (
    offset INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, topic TEXT NOT NULL, priority INTEGER NOT NULL,
    data BLOB NOT NULL);
CREATE TABLE groups (name TEXT PRIMARY KEY, lasting INTEGER NOT NULL, topics TEXT NOT NULL, heard REAL NOT NULL);
CREATE TABLE pending (
    name TEXT NOT NULL, offset INTEGER NOT NULL, priority INTEGER NOT NULL, PRIMARY KEY (name, offset)) WITHOUT ROWID;
CREATE INDEX pending_by_offset ON pending (offset);
"""
_BELOW = "(topic = ? OR substr(topic, 1, length(?) + 1) = ? || '.')"


class GroupRow(NamedTuple):
    """A group as the journal knows it: `heard` is the last time that somebody listened, in seconds since the epoch."""

    name: str
    lasting: bool
    topics: tuple[str, ...]
    heard: float


class Letter(NamedTuple):
    """A letter in the journal; `data` is the encoded envelope."""

    offset: int
    topic: str
    data: bytes


class Waiting(NamedTuple):
    """A letter that a group has not acknowledged."""

    offset: int
    priority: Priority


@final
class Journal:
    """An append-only list of letters with a place for each group; one process at a time may have it open.

    A transaction is kept when `transaction` returns, whatever process is killed afterwards; after a power failure
    the last moments may be missing, never damaged.

    Args:
        path: the file; `:memory:` keeps everything in memory.

    Raises:
        BusError: the file cannot be opened, is no journal, is of another version, or another process has it open.

    Example:
        >>> journal = Journal(":memory:")
        >>> with journal.transaction():
        ...     journal.append("id-1", "a.b", Priority.NORMAL, b"letter", ["reader"])
        1
        >>> [letter.offset for letter in journal.replay(since=1, topics=("a",))]
        [1]
    """

    def __init__(self, path: str | Path) -> None:
        """Open the journal, and make it if there is none."""
        self.path = str(path)
        self._db = sqlite3.connect(self.path, timeout=0.0, isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except BaseException as error:
            self._db.close()
            if isinstance(error, sqlite3.Error):
                hint = "another process may have it open, or it is damaged; stop the other process or move it away"
                raise BusError(f"The journal {self.path} cannot be opened: {error}; {hint}.") from error
            raise

    def _open(self) -> None:
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL"):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        self._db.execute("BEGIN EXCLUSIVE")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            known = f"this release reads version {_VERSION}"
            raise BusError(f"The journal {self.path} has version {version}; {known}: move it away or use its release.")
        self._db.execute("COMMIT")
        if version == 0:
            self._db.executescript(f"BEGIN;{_TABLES}PRAGMA user_version = {_VERSION};COMMIT;")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep everything written in the block, or nothing.

        Raises:
            BusError: the block cannot be kept, e.g. because the disk is full.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            self._make_room()
            text = f"The journal {self.path} cannot be written: {error}"
            raise BusError(f"{text}; free some space on its disk.") from error
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _make_room(self) -> None:
        """Fold the write-ahead log into the file: it is what grows first on a full disk."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def find(self, letter_id: str) -> int | None:
        """Return the offset of a letter by its envelope's id, if the journal still has it."""
        row = self._db.execute("SELECT offset FROM letters WHERE id = ?", (letter_id,)).fetchone()
        return None if row is None else int(row[0])

    def append(self, letter_id: str, topic: str, priority: Priority, data: bytes, groups: Iterable[str]) -> int:
        """Add a letter that `groups` have to acknowledge; return its offset."""
        row = (letter_id, topic, int(priority), data)
        cursor = self._db.execute("INSERT INTO letters (id, topic, priority, data) VALUES (?, ?, ?, ?)", row)
        offset = cursor.lastrowid
        assert offset is not None
        rows = [(name, offset, int(priority)) for name in groups]
        self._db.executemany("INSERT INTO pending VALUES (?, ?, ?)", rows)
        return offset

    def read(self, offset: int) -> bytes | None:
        """Return a letter's bytes, or `None` if it is gone."""
        row = self._db.execute("SELECT data FROM letters WHERE offset = ?", (offset,)).fetchone()
        return None if row is None else row[0]

    @property
    def end(self) -> int:
        """The next letter's offset."""
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'letters'").fetchone()
        return 1 if row is None else int(row[0]) + 1

    def replay(self, since: int = 1, topics: Sequence[str] = ()) -> Iterator[Letter]:
        """Yield the letters from an offset on, in order; no topics: all of them."""
        where = f" AND ({_any_of(topics)})" if topics else ""
        query = f"SELECT offset, topic, data FROM letters WHERE offset >= ?{where} ORDER BY offset LIMIT {_PAGE}"
        while rows := self._db.execute(query, (since, *_thrice(topics))).fetchall():
            yield from (Letter(*row) for row in rows)
            since = rows[-1][0] + 1

    def groups(self) -> list[GroupRow]:
        """Return every group."""
        rows = self._db.execute("SELECT name, lasting, topics, heard FROM groups").fetchall()
        return [
            GroupRow(name, bool(lasting), tuple(json.loads(topics)), heard) for name, lasting, topics, heard in rows
        ]

    def set_group(self, name: str, lasting: bool, topics: Sequence[str]) -> None:
        """Add a group, or give it other topics: what waits under topics that it no longer has is let go."""
        row = (name, int(lasting), json.dumps(list(topics)), time.time())
        self._db.execute("INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?)", row)
        kept = f"SELECT 1 FROM letters WHERE letters.offset = pending.offset AND ({_any_of(topics)})"
        query = f"DELETE FROM pending WHERE name = ? AND NOT EXISTS ({kept})"
        self._db.execute(query, (name, *_thrice(topics)))

    def rewind(self, name: str, topics: Sequence[str], since: int) -> None:
        """Let a group get every letter from an offset on again, and none before it."""
        self._db.execute("DELETE FROM pending WHERE name = ?", (name,))
        query = f"SELECT ?, offset, priority FROM letters WHERE offset >= ? AND ({_any_of(topics)})"
        self._db.execute(f"INSERT INTO pending {query}", (name, since, *_thrice(topics)))

    def heard(self, names: Iterable[str]) -> None:
        """Write down that somebody listens for these groups now."""
        now = time.time()
        self._db.executemany("UPDATE groups SET heard = ? WHERE name = ?", [(now, name) for name in names])

    def forget(self, name: str) -> None:
        """Remove a group and what waits for it."""
        self._db.execute("DELETE FROM pending WHERE name = ?", (name,))
        self._db.execute("DELETE FROM groups WHERE name = ?", (name,))

    def ack(self, name: str, offsets: Iterable[int]) -> None:
        """Write down that a group is done with these letters."""
        rows = [(name, offset) for offset in offsets]
        self._db.executemany("DELETE FROM pending WHERE name = ? AND offset = ?", rows)

    def pending(self, name: str) -> list[Waiting]:
        """Return what a group has not acknowledged, in order of arrival."""
        rows = self._db.execute(
            "SELECT offset, priority FROM pending WHERE name = ? ORDER BY offset", (name,)
        ).fetchall()
        return [Waiting(offset, Priority(priority)) for offset, priority in rows]

    def place(self, name: str) -> int:
        """Return the first offset that a group still needs: everything before it is acknowledged."""
        row = self._db.execute("SELECT min(offset) FROM pending WHERE name = ?", (name,)).fetchone()
        return self.end if row[0] is None else int(row[0])

    def compact(self, retention: int) -> int:
        """Remove letters that every group has acknowledged, but for the newest `retention` ones; return how many."""
        unneeded = "NOT EXISTS (SELECT 1 FROM pending WHERE pending.offset = letters.offset)"
        query = f"DELETE FROM letters WHERE offset < ? AND {unneeded}"
        return self._db.execute(query, (self.end - retention,)).rowcount

    def close(self) -> None:
        """Close the file; a second call changes nothing."""
        self._db.close()


def _any_of(topics: Sequence[str]) -> str:
    """Return the condition that a letter's topic is one of these or below one; each takes three arguments."""
    return " OR ".join([_BELOW] * len(topics))


def _thrice(topics: Sequence[str]) -> list[str]:
    return [topic for topic in topics for _ in range(3)]
