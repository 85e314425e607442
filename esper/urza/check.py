"""What is wrong with a store, for `esper doctor`: chain, hashes, signatures and statuses are checked, none repaired."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

from esper.leyline.artifacts import Role
from esper.leyline.base import Message
from esper.leyline.errors import EsperError
from esper.leyline.kernels import ArtifactStatus, CompiledKernelArtifact
from esper.urza.changes import Core
from esper.urza.designs import check_id
from esper.urza.door import Door
from esper.urza.field import OUTCOMES, REPORTS, Kept, Outcomes
from esper.urza.records import Table
from esper.urza.retention import Archive

_M = TypeVar("_M", bound=Message)
_S = ArtifactStatus


class Finding(NamedTuple):
    """Something that is wrong.

    Args:
        subject: kernel, blueprint, or `records`, `ledger`.
        problem: one sentence.
    """

    subject: str
    problem: str

    def __str__(self) -> str:
        """Return both in one line."""
        return f"{self.subject}: {self.problem}"


def check(core: Core, archive: Archive) -> list[Finding]:
    """Look at everything; nothing is written.

    Returns:
        What is wrong: nothing, when the list is empty.
    """
    return list(_findings(core, archive))


def _findings(core: Core, archive: Archive) -> Iterator[Finding]:
    yield from (Finding("records", problem) for problem in core.records.problems())
    yield from (Finding("ledger", problem) for problem in core.ledger.verify(core.records.head()))
    said = _statuses(core)
    door = Door(core)
    for kernel, finding in _readable(core.records.kernels):
        yield from finding
        if kernel is not None:
            yield from _differs(kernel.id, kernel.status, said)
            yield from _tried(kernel.id, partial(_check_kernel, core, door, archive, kernel))
    for blueprint, finding in _readable(core.records.blueprints):
        yield from finding
        if blueprint is not None:
            yield from _differs(blueprint.id, blueprint.status, said)
            yield from _tried(blueprint.id, partial(check_id, blueprint))
    records = core.records
    others: tuple[Table[Any], ...] = (records.manifests, records.attestations, records.uses, records.alerts)
    others += (records.table(REPORTS, Kept), records.table(OUTCOMES, Outcomes))
    for table in others:
        for _, finding in _readable(table):
            yield from finding


def _readable(table: Table[_M]) -> Iterator[tuple[_M | None, list[Finding]]]:
    """Yield every record that can be read, and a finding for every other."""
    try:
        keys = table.keys()
    except EsperError as error:
        yield None, [Finding("records", f"the table {table.name} cannot be listed: {error}")]
        return
    for key in keys:
        try:
            yield table.get(key), []
        except EsperError as error:
            yield None, [Finding(key, str(error))]


def _statuses(core: Core) -> dict[str, str]:
    """Return the last status of every subject that the ledger speaks of, up to the end that the records know."""
    said: dict[str, str] = {}
    end = core.records.head().sequence
    try:
        for entry in core.ledger.entries():
            if entry.after and entry.sequence <= end:
                said[entry.subject] = entry.after
    except EsperError:
        return {}  # The chain's own check has named the damage.
    return said


def _differs(subject: str, status: ArtifactStatus, said: dict[str, str]) -> Iterator[Finding]:
    if said.get(subject, status) != status:
        yield Finding(subject, f"the records say {status}, the ledger says {said[subject]}")


def _tried(subject: str, call: Callable[[], None]) -> Iterator[Finding]:
    try:
        call()
    except EsperError as error:
        yield Finding(subject, f"{type(error).__name__}: {error}")


def _check_kernel(core: Core, door: Door, archive: Archive, kernel: CompiledKernelArtifact) -> None:
    """Raise what is wrong with a kernel's files or with what was said about it."""
    if kernel.status is _S.ARCHIVED:
        archive.read(kernel.kernel_ref)
        return
    if kernel.status is _S.VALIDATED:
        door.verified(kernel.id)
        return
    door.signed(kernel)
    if kernel.status is _S.REJECTED:
        door.check(core.records.attestations.need(f"{kernel.id}/{Role.URABRASK}"), kernel, Role.URABRASK)
