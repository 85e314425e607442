"""Urza's records: typed tables of encoded messages under text keys, changed in transactions."""

import logging
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, final

from diskcache import Cache, Timeout  # type: ignore[import-untyped]
from pydantic import Field

from esper.leyline.artifacts import Attestation, KernelManifest
from esper.leyline.base import Message
from esper.leyline.codec import decode, encode
from esper.leyline.errors import ContractError, SchemaMismatch, StoreError
from esper.leyline.events import SecurityAlert
from esper.leyline.kernels import Blueprint, CompiledKernelArtifact
from esper.urza.disk import PlainDisk

_M = TypeVar("_M", bound=Message)

_FORMAT: Final = {"format": 1}
_SUMMED: Final = b"\xc1"
_log = logging.getLogger(__name__)
_PATIENCE_S: Final = 30.0


class Use(Message):
    """How often and when a kernel was used.

    Args:
        count: times it was loaded or reported as grafted.
        last: when, in seconds since the Unix epoch.
    """

    count: int = Field(default=0, ge=0)
    last: float = Field(default=0.0, ge=0.0)


class Head(Message):
    """Where the ledger ends.

    Args:
        sequence: number of entries.
        hash: hash of the last one; empty for none.
        size: length of the ledger's file, in bytes.
    """

    sequence: int = Field(default=0, ge=0)
    hash: str = ""
    size: int = Field(default=0, ge=0)


@final
class Table(Generic[_M]):
    """The records of one kind; keys are ids.

    Args:
        cache: the database.
        name: what its keys begin with.
        kind: class of its records.
    """

    def __init__(self, cache: Cache, name: str, kind: type[_M]) -> None:
        """Remember where."""
        self._cache, self.name, self.kind = cache, name, kind

    def get(self, key: str) -> _M | None:
        """Return a record, or None if there is none.

        Raises:
            StoreError: it is damaged.
            TrustError: its row was not written by Urza.
        """
        try:
            return self._read(key)
        except ContractError as error:
            raise StoreError(f"Record {self.name}/{key} is damaged: {error}") from error

    def damage(self, key: str) -> str:
        """Return what is wrong with a record, as `get` would say it; empty where nothing is, or there is none.

        Raises:
            SchemaMismatch: it is not damaged, another release has written it.
            StoreError: the database cannot be read.
            TrustError: its row was not written by Urza.
        """
        try:
            self._read(key)
        except SchemaMismatch as error:
            raise SchemaMismatch(f"Record {self.name}/{key} is of another release: {error}") from error
        except ContractError as error:
            return f"Record {self.name}/{key} is damaged: {error}"
        return ""

    def _read(self, key: str) -> _M | None:
        """Return a record, or None if there is none; a ContractError is about this record, a StoreError about all."""
        with reading(f"{self.name}/{key}"):
            try:
                data = self._cache.get(f"{self.name}/{key}")
            except StoreError as error:
                # So far only the row can have raised it: the database's errors are turned into ours further out.
                raise ContractError(str(error)) from error
        if data is None:
            return None
        if not isinstance(data, bytes):
            raise ContractError(f"it holds a {type(data).__name__}, not a message.")
        return decode(self.kind, _checked(data))

    def need(self, key: str) -> _M:
        """Return a record.

        Raises:
            StoreError: there is none, or it is damaged.
        """
        record = self.get(key)
        if record is None:
            raise StoreError(f"There is no {self.name} {key!r} in this store; ids are listed by `esper kernels`.")
        return record

    def set(self, key: str, record: _M) -> None:
        """Write a record."""
        with reading(f"{self.name}/{key}"):
            self._cache.set(f"{self.name}/{key}", _summed(encode(record)))

    def drop(self, key: str) -> None:
        """Forget a record; nothing happens where there is none."""
        with reading(f"{self.name}/{key}"):
            self._cache.delete(f"{self.name}/{key}")

    def compare_and_set(self, key: str, expected: _M | None, record: _M) -> None:
        """Write a record if the present one is what the caller believes it to be; safe among processes.

        Raises:
            StoreError: another writer was faster.
        """
        with reading(f"{self.name}/{key}"), self._cache.transact():
            if self.get(key) != expected:
                raise StoreError(f"Record {self.name}/{key} was changed by another writer; read it again.")
            self.set(key, record)

    def keys(self) -> list[str]:
        """Return the keys of all records, sorted."""
        start = f"{self.name}/"
        with reading(self.name):
            found = [key for key in self._cache.iterkeys() if isinstance(key, str) and key.startswith(start)]
        return [key.removeprefix(start) for key in found]

    def items(self) -> Iterator[tuple[str, _M]]:
        """Yield the records by key; one that is damaged hides no other: it is left out, and `check` reports it."""
        for key in self.keys():
            try:
                record = self.get(key)
            except StoreError as error:
                _log.warning("%s", error)
                continue
            if record is not None:
                yield key, record


def _summed(data: bytes) -> bytes:
    """Return a record with its checksum in front; no encoded message begins with this mark."""
    return _SUMMED + zlib.crc32(data).to_bytes(4, "big") + data


def _checked(data: bytes) -> bytes:
    """Return a record without its checksum; one that was written without any is taken as it is.

    Raises:
        ContractError: it is not what was written.
    """
    if data[:1] != _SUMMED:
        return data
    if zlib.crc32(data[5:]) != int.from_bytes(data[1:5], "big"):
        raise ContractError("its checksum does not fit.")
    return data[5:]


@final
class Records:
    """Every table of a store, in one database that several processes may write to.

    Args:
        folder: where the database is.

    Raises:
        StoreError: it cannot be opened, or another release has written it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     records = Records(folder)
        ...     with records.transaction():
        ...         records.uses.set("k", Use(count=1))
        ...     records.uses.need("k").count
        ...     records.close()
        1
    """

    def __init__(self, folder: str | Path) -> None:
        """Open or make the database."""
        self.folder = Path(folder)
        self._cache = self._open()
        self.blueprints = Table(self._cache, "blueprint", Blueprint)
        self.kernels = Table(self._cache, "kernel", CompiledKernelArtifact)
        self.manifests = Table(self._cache, "manifest", KernelManifest)
        self.attestations = Table(self._cache, "attestation", Attestation)
        self.uses = Table(self._cache, "use", Use)
        self.alerts = Table(self._cache, "alert", SecurityAlert)
        self._heads = Table(self._cache, "ledger", Head)
        self._check_format()

    def _open(self) -> Cache:
        """Open the database, without diskcache's habit of throwing old records out."""
        try:
            return Cache(
                self.folder,
                timeout=_PATIENCE_S,
                disk=PlainDisk,
                eviction_policy="none",
                cull_limit=0,
                sqlite_mmap_size=0,
                sqlite_synchronous=2,
            )
        except (OSError, sqlite3.Error, Timeout, TypeError, AttributeError, ValueError) as error:
            raise StoreError(
                f"The records in {self.folder} cannot be opened: {error or type(error).__name__}."
            ) from error

    def table(self, name: str, kind: type[_M]) -> Table[_M]:
        """Return the records of a further kind, whose keys begin with a name of their own."""
        return Table(self._cache, name, kind)

    def _check_format(self) -> None:
        with reading("meta"):
            if self._cache.get("meta") is None:
                self._cache.add("meta", _FORMAT)
            found = self._cache.get("meta")
        if found != _FORMAT:
            raise StoreError(f"The records in {self.folder} have the format {found}; this release reads {_FORMAT}.")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the database for one change: all of it happens, or none.

        Raises:
            StoreError: other writers held it too long, or it cannot be written.
        """
        with reading("transaction"):
            try:
                with self._cache.transact():
                    yield
            finally:
                # A commit that failed, e.g. on a full disk, leaves the connection inside its transaction.
                if self._cache._con.in_transaction:
                    self._cache._con.rollback()

    def head(self) -> Head:
        """Return where the ledger ends."""
        return self._heads.get("head") or Head()

    def set_head(self, head: Head) -> None:
        """Say where the ledger ends."""
        self._heads.set("head", head)

    def number(self, key: str) -> int:
        """Return a number, 0 if it was never written."""
        with reading(key):
            value = self._cache.get(f"number/{key}", 0)
        return _typed(key, value, int)

    def set_number(self, key: str, value: int) -> None:
        """Write a number."""
        with reading(key):
            self._cache.set(f"number/{key}", value)

    def text(self, key: str) -> str:
        """Return a text, empty if it was never written."""
        with reading(key):
            value = self._cache.get(f"text/{key}", "")
        return _typed(key, value, str)

    def set_text(self, key: str, value: str) -> None:
        """Write a text."""
        with reading(key):
            self._cache.set(f"text/{key}", value)

    def drop_text(self, key: str) -> None:
        """Forget a text; nothing happens where there is none."""
        with reading(key):
            self._cache.delete(f"text/{key}")

    def next_serial(self) -> int:
        """Return a number greater than any before; call it inside a transaction."""
        serial = self.number("serial") + 1
        self.set_number("serial", serial)
        return serial

    def problems(self) -> list[str]:
        """Return what SQLite finds wrong with the database file, and the keys that Urza did not write."""
        with reading("check"):
            rows = self._cache._sql("PRAGMA integrity_check").fetchall()
            strange = "SELECT key, mode FROM Cache WHERE raw != 1 OR mode NOT IN (1, 5) OR filename IS NOT NULL"
            planted = self._cache._sql(strange).fetchall()
        broken = [str(row[0]) for row in rows if row[0] != "ok"]
        return broken + [f"row {key!r} has mode {mode}: it was not written by Urza" for key, mode in planted]

    def compact(self) -> None:
        """Move the write-ahead log into the database file, so that the file is complete by itself."""
        with reading("compact"):
            self._cache._sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Close the database; may be called twice."""
        self._cache.close()


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn the database's own errors into ours.

    Raises:
        StoreError: the database is locked, full or damaged.
    """
    try:
        yield
    except Timeout as error:
        raise StoreError(f"{what}: other writers held the records for {_PATIENCE_S:.0f} s; try again.") from error
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{what}: the records cannot be read or written: {error}; see `esper doctor`.") from error


_T = TypeVar("_T", int, str)


def _typed(key: str, value: Any, kind: type[_T]) -> _T:
    if type(value) is not kind:
        raise StoreError(f"Record {key} holds a {type(value).__name__}, not {kind.__name__}; it is damaged.")
    return value
