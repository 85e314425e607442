"""How records lie in diskcache: bytes, text, numbers and JSON, always inside the database, and never a pickle.

diskcache on its own pickles what it does not know and unpickles what a row says is a pickle. Whoever can write to the
database could so run code in every reader. Here such rows are refused, and so are rows that point at files.
"""

import json
from pathlib import PurePath
from typing import Any, Final, final

from diskcache import UNKNOWN, Disk  # type: ignore[import-untyped]
from diskcache.core import MODE_RAW  # type: ignore[import-untyped]

from esper.leyline.errors import StoreError, TrustError, UnsafePath

MODE_JSON: Final = 5
"""Mode of rows that hold JSON; diskcache itself uses 0 to 4."""

_LARGEST: Final = 2**63


@final
class PlainDisk(Disk):  # type: ignore[misc]
    """A diskcache Disk that stores plain data only.

    Example:
        >>> disk = PlainDisk("/nowhere")
        >>> disk.fetch(*disk.store({"a": 1}, False)[1:], False)
        {'a': 1}
    """

    def put(self, key: Any) -> tuple[Any, bool]:
        """Return a key as the database keeps it.

        Raises:
            StoreError: it is no text, bytes or number.
        """
        if not _is_raw(key):
            raise StoreError(f"A {type(key).__name__} cannot be a key of a record; use text.")
        return (memoryview(key) if isinstance(key, bytes) else key), True

    def get(self, key: Any, raw: bool) -> Any:
        """Return a key of the database.

        Raises:
            TrustError: the row says that its key is a pickle.
        """
        if not raw:
            raise TrustError("A record's key is marked as a pickle; it was not written by Urza and is not read.")
        return key

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> tuple[int, int, str | None, Any]:
        """Return size, mode, file name and content of a value's row; there is never a file.

        Raises:
            StoreError: it is no plain data.
        """
        if read:
            raise StoreError(f"Record {key!r} cannot be read from a file; give its bytes.")
        if _is_raw(value):
            return 0, MODE_RAW, None, memoryview(value) if isinstance(value, bytes) else value
        try:
            return 0, MODE_JSON, None, json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise StoreError(f"Record {key!r} is no plain data: {error}; use bytes, text, numbers or JSON.") from error

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        """Return the value of a row.

        Raises:
            TrustError: the row says that it is a pickle or a file.
            StoreError: it holds broken JSON.
        """
        if filename is not None:
            raise UnsafePath(
                f"A record points at the file {PurePath(filename).name!r}; Urza keeps records inside only."
            )
        if mode == MODE_RAW and not read:
            return value
        if mode != MODE_JSON or read:
            raise TrustError(
                f"A record has mode {mode}; Urza writes {MODE_RAW} and {MODE_JSON} only, and reads no pickle."
            )
        try:
            return json.loads(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise StoreError(f"A record holds broken JSON: {error}.") from error

    def remove(self, file_path: str) -> None:
        """Refuse to remove a file: no record of ours has one.

        Raises:
            UnsafePath: always.
        """
        raise UnsafePath(f"A record points at the file {PurePath(file_path).name!r}; it is left alone.")


def _is_raw(value: Any) -> bool:
    """Whether SQLite holds a value as it is."""
    if type(value) is int:
        return -_LARGEST <= value < _LARGEST
    return type(value) in (bytes, str, float)
