"""Field reports in the store: what grafts really did, each kept once, the oldest given up where all take too much."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from typing import Final, final

from pydantic import Field

from esper.leyline.base import Message
from esper.leyline.codec import encode, to_json
from esper.leyline.errors import ContractError, StoreError
from esper.leyline.reports import FieldReport
from esper.leyline.states import Reason, SeedState
from esper.urza.records import Records

REPORTS, OUTCOMES = "report", "outcomes"
"""Names of the tables of `Kept` and of `Outcomes`."""

BUDGET: Final = 32 * 2**20
"""Bytes that all field reports of a store may take."""

LARGEST: Final = 64 * 2**10
"""Largest field report, in bytes."""

_log = logging.getLogger(__name__)
_FAULTS: Final = frozenset({Reason.RUNTIME_ERROR, Reason.KERNEL_LOAD_FAILED})


class Outcomes(Message):
    """What became of the grafts of a kernel; those that neither stayed nor were culled were cancelled or rolled back.

    Args:
        grafted: life cycles that have ended.
        fossilized: of these, how many stayed.
        culled: how many were removed, though their kernel did what it should.
        faulted: how many were removed because their kernel failed.
    """

    grafted: int = Field(default=0, ge=0)
    fossilized: int = Field(default=0, ge=0)
    culled: int = Field(default=0, ge=0)
    faulted: int = Field(default=0, ge=0)

    def with_one(self, report: FieldReport) -> "Outcomes":
        """Return them with one more.

        Example:
            >>> from esper import leyline as ll
            >>> site = ll.SiteInfo(module_path="a", module_type="Linear", layout="bd", width=8, input_width=8, depth=0)
            >>> ended = {"outcome": "CULLED", "reason": "RUNTIME_ERROR"}
            >>> report = ll.FieldReport(run_id="r", blueprint_id="b", seed_id="a#0.0", site=site, **ended)
            >>> str(Outcomes(grafted=2, fossilized=2).with_one(report))
            '3: 2 stayed, 1 faulted'
        """
        faulted = report.reason in _FAULTS
        return Outcomes(
            grafted=self.grafted + 1,
            fossilized=self.fossilized + (report.outcome is SeedState.FOSSILIZED),
            culled=self.culled + (report.outcome is SeedState.CULLED and not faulted),
            faulted=self.faulted + faulted,
        )

    def __str__(self) -> str:
        """Return them in a few words; nothing where there are none."""
        parts = {"stayed": self.fossilized, "culled": self.culled, "faulted": self.faulted}
        return f"{self.grafted}: " + ", ".join(f"{n} {word}" for word, n in parts.items() if n) if self.grafted else ""


class Kept(Message):
    """A field report as the store keeps it.

    Args:
        id: SHA-256 of what it says; the same graft, reported again by a resumed run, has the same.
        report: what the graft did.
        received: when it came, in seconds since the Unix epoch.
        size: bytes that the report takes.
    """

    id: str
    report: FieldReport
    received: float = Field(default=0.0, ge=0.0)
    size: int = Field(default=0, ge=0)


@final
class FieldReports:
    """The field reports of a store; every change is made inside a transaction of the caller.

    Args:
        records: where they are.
        budget: bytes that all of them may take; the counts by kernel outlive the reports.
    """

    def __init__(self, records: Records, budget: int = BUDGET) -> None:
        """Remember where."""
        self._records, self._budget = records, budget
        self._table = records.table(REPORTS, Kept)
        self._outcomes = records.table(OUTCOMES, Outcomes)

    def __iter__(self) -> Iterator[Kept]:
        """Yield them in the order in which they came."""
        return (kept for _, kept in self._table.items())

    def knows(self, report_id: str) -> bool:
        """Return whether a report was kept, and not given up since."""
        return bool(self._records.text(_place(report_id)))

    def outcomes(self, kernel_id: str) -> Outcomes:
        """Return what became of the grafts of a kernel; a count that is damaged begins anew, and `check` reports it."""
        try:
            return self._outcomes.get(kernel_id) or Outcomes()
        except StoreError as error:
            _log.warning("%s", error)
            return Outcomes()

    def keep(self, report: FieldReport, *, counts: bool) -> None:
        """Keep a report that is not known.

        Args:
            report: the report.
            counts: whether to count it among the outcomes of its kernel.
        """
        number = self._records.number("reports/last") + 1
        kept = Kept(id=report_id(report), report=report, received=time.time(), size=len(encode(report)))
        self._table.set(_key(number), kept)
        self._records.set_text(_place(kept.id), _key(number))
        self._records.set_number("reports/last", number)
        self._records.set_number("reports/bytes", self._records.number("reports/bytes") + kept.size)
        if counts:
            name = report.kernel_artifact_id
            self._outcomes.set(name, self.outcomes(name).with_one(report))
        self._give_up_the_oldest(number)

    def _give_up_the_oldest(self, last: int) -> None:
        size, first = self._records.number("reports/bytes"), self._records.number("reports/first") + 1
        while size > self._budget and first < last:
            freed, first = self._give_up(_key(first)), first + 1
            size = sum(kept.size for kept in self) if freed is None else size - freed
        self._records.set_number("reports/bytes", size)
        self._records.set_number("reports/first", first - 1)

    def _give_up(self, key: str) -> int | None:
        """Forget a report and return the bytes that it took; None where it cannot be read any more."""
        try:
            kept = self._table.need(key)
        except StoreError:
            return None
        finally:
            self._table.drop(key)
        self._records.drop_text(_place(kept.id))
        return kept.size


def report_id(report: FieldReport) -> str:
    """Return the SHA-256 of what a report says, in whatever order.

    Raises:
        ContractError: it is larger than any graft has reason for.
    """
    text = to_json(report)
    if len(text) > LARGEST:
        raise ContractError(f"A field report of {len(text)} bytes is too long; at most {LARGEST} are kept.")
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()


def _key(number: int) -> str:
    return f"{number:012d}"


def _place(report: str) -> str:
    return f"report/{report}"
