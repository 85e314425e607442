"""A change: records and ledger move together, or not at all, whenever the process is killed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, final

from esper.leyline.errors import IllegalTransition, StoreError
from esper.leyline.kernels import ArtifactStatus
from esper.urza.artifacts import ArtifactTree
from esper.urza.ledger import Ledger, Note
from esper.urza.records import Head, Records
from esper.urza.signing import KeyRing

_S = ArtifactStatus

ALLOWED: dict[ArtifactStatus, frozenset[ArtifactStatus]] = {
    _S.UNVALIDATED: frozenset({_S.COMPILING, _S.INVALID}),
    _S.COMPILING: frozenset({_S.INVALID, _S.PENDING_BENCHMARKING}),
    _S.INVALID: frozenset({_S.COMPILING, _S.ARCHIVED}),
    _S.PENDING_BENCHMARKING: frozenset({_S.VALIDATED, _S.REJECTED}),
    _S.VALIDATED: frozenset({_S.REJECTED, _S.COMPILING, _S.ARCHIVED}),
    _S.REJECTED: frozenset({_S.COMPILING, _S.ARCHIVED}),
    _S.ARCHIVED: frozenset({_S.COMPILING, _S.PENDING_BENCHMARKING}),
}
"""The one table of statuses: what may follow what. VALIDATED to REJECTED is a kernel that faulted in a run; ARCHIVED
to PENDING_BENCHMARKING is one that was restored, and is judged anew."""


def check_step(before: ArtifactStatus, after: ArtifactStatus) -> None:
    """Check that one status may follow another.

    Raises:
        IllegalTransition: it may not.

    Example:
        >>> check_step(ArtifactStatus.COMPILING, ArtifactStatus.INVALID)
    """
    if after not in ALLOWED[before]:
        raise IllegalTransition(before, after, sorted(ALLOWED[before]))


@final
class Change:
    """The lines that one change will add to the ledger."""

    def __init__(self) -> None:
        """Begin without lines."""
        self.notes: list[Note] = []

    def note(
        self, role: str, action: str, subject: str, *, before: str = "", after: str = "", detail: str = ""
    ) -> None:
        """Add a line; see `esper.urza.ledger.Entry`."""
        self.notes.append(Note(role, action, subject, before, after, detail))


class Core(NamedTuple):
    """What every part of Urza works on.

    Args:
        records: the tables.
        ledger: the chain.
        tree: the artifacts.
        keys: the keys of the roles.
    """

    records: Records
    ledger: Ledger
    tree: ArtifactTree
    keys: KeyRing

    @contextmanager
    def change(self) -> Iterator[Change]:
        """Hold the store for one change.

        The ledger's lines are written before the records are committed: a process killed in between leaves lines of a
        change that never happened, and the next change moves them aside.

        Raises:
            StoreError: other writers hold the store, the disk is full, or the ledger was cut.
        """
        with self.ledger.locked():
            self._settle()
            with self.records.transaction():
                change = Change()
                yield change
                self._write(change.notes)

    def _settle(self) -> None:
        """Move aside what a killed writer left at the end of the ledger, and say so in a line of its own."""
        moved = self.ledger.settle(self.records.head())
        if moved:
            with self.records.transaction():
                self._write([Note("", "recovered", "ledger", detail=moved)])

    def _write(self, notes: Sequence[Note]) -> None:
        if notes:
            self.records.set_head(self.ledger.append(self.records.head(), notes))

    def restart_ledger(self, reason: str) -> str:
        """Move a broken ledger aside and begin a new chain, whose first line says so.

        Raises:
            StoreError: no reason is given.

        Returns:
            Where the old one is, with its SHA-256.
        """
        if not reason:
            raise StoreError("Say why the ledger begins anew; the reason becomes its first line.")
        with self.ledger.locked(), self.records.transaction():
            old = self.records.head()
            moved = self.ledger.restart()
            note = Note("", "restarted", "ledger", detail=f"{reason}; {old.sequence} entries are in {moved}")
            self.records.set_head(self.ledger.append(Head(), [note]))
            self.records.set_number("restarts", self.records.number("restarts") + 1)
        return moved
