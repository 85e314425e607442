"""The jobs of a pool, on disk: whatever is killed whenever, no job is lost and none has two results."""

import json
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, final

from esper.leyline.envelope import Priority
from esper.leyline.errors import JobError, StoreError
from esper.leyline.ids import new_id
from esper.workers.contracts import ENDED, Job, JobResult, JobState

MAX_PAYLOAD: Final = 64 * 2**20
"""Longest payload and longest result, in bytes."""

_BUSY_S: Final = 30.0
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, payload BLOB NOT NULL,
    priority INTEGER NOT NULL, state TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0,
    worker TEXT NOT NULL DEFAULT '', lease_until REAL NOT NULL DEFAULT 0,
    submitted REAL NOT NULL, ended REAL NOT NULL DEFAULT 0, cpu_seconds REAL NOT NULL DEFAULT 0,
    result BLOB NOT NULL DEFAULT x'', reasons TEXT NOT NULL DEFAULT '[]', taken INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS queue ON jobs (state, priority, submitted);
CREATE TABLE IF NOT EXISTS spent (day TEXT PRIMARY KEY, cpu_seconds REAL NOT NULL);
"""
_RESULT: Final = "id, key, kind, state, result, reasons, tries, cpu_seconds, worker"


@final
class JobJournal:
    """Jobs in a SQLite file; safe to use from several threads and several processes.

    Args:
        path: the file; it is made if it does not exist.
        max_tries: a job is put in quarantine when this many tries have failed.

    Raises:
        StoreError: the file cannot be opened, is not a journal, or the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = JobJournal(f"{folder}/jobs.sqlite")
        ...     first, second = journal.submit("a", "echo", b"1"), journal.submit("a", "echo", b"1")
        ...     job = journal.lease("worker", lease_s=5.0)
        ...     changed = journal.done(job.id, b"one"), journal.done(job.id, b"again")
        ...     results = journal.untaken()
        ...     journal.close()
        >>> first == second, changed, results[0].result
        (True, (True, False), b'one')
    """

    def __init__(self, path: str | Path, *, max_tries: int = 3) -> None:
        """Open the journal."""
        self._path, self._max_tries = Path(path), max_tries
        self._least = max(Priority)
        self._lock = threading.RLock()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=FULL")
            self._base.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"The job journal {self._path} cannot be opened: {error}.") from error

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """Change the journal in one step, or not at all."""
        with self._lock:
            try:
                self._base.execute("BEGIN IMMEDIATE")
                try:
                    yield self._base
                except BaseException:
                    self._base.execute("ROLLBACK")
                    raise
                self._base.execute("COMMIT")
            except sqlite3.Error as error:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise StoreError(f"The job journal {self._path} cannot be changed: {error}.") from error

    def _read(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            try:
                return self._base.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise StoreError(f"The job journal {self._path} cannot be read: {error}.") from error

    # --- the submitter's side -----------------------------------------------------------------------------------

    def submit(self, key: str, kind: str, payload: bytes, priority: int = Priority.NORMAL) -> str:
        """Add a job and return its id; a known key is the same job, and its result is handed out again.

        Raises:
            JobError: the payload is too long.
        """
        _check_size(f"The payload of job {key!r}", payload)
        with self._changing() as base:
            values = (new_id(), key, kind, payload, int(priority), JobState.WAITING, time.time())
            base.execute(
                "INSERT INTO jobs (id, key, kind, payload, priority, state, submitted) VALUES (?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (key) DO UPDATE SET taken = 0, priority = min(priority, excluded.priority)",
                values,
            )
            found: str = base.execute("SELECT id FROM jobs WHERE key = ?", (key,)).fetchone()[0]
            return found

    def untaken(self) -> list[JobResult]:
        """Return the results that nobody has taken, oldest first."""
        rows = self._read(f"SELECT {_RESULT} FROM jobs WHERE state IN (?, ?, ?) AND taken = 0 ORDER BY ended", *ENDED)
        return [_result(row) for row in rows]

    def take(self, job_ids: list[str]) -> None:
        """Note that the submitter has the results of these jobs."""
        with self._changing() as base:
            base.executemany("UPDATE jobs SET taken = 1 WHERE id = ?", [(job_id,) for job_id in job_ids])

    def result(self, job_id: str) -> JobResult | None:
        """Return a job's result, taken or not; None while it has none.

        Raises:
            JobError: there is no such job.
        """
        rows = self._read(f"SELECT {_RESULT} FROM jobs WHERE id = ?", job_id)
        if not rows:
            raise JobError(f"There is no job {job_id!r} in {self._path}; its result may have been pruned.")
        found = _result(rows[0])
        return found if found.state in ENDED else None

    def revive(self, job_id: str) -> bool:
        """Give a failed or quarantined job another chance; return whether it had ended so."""
        with self._changing() as base:
            return _changed(
                base,
                "UPDATE jobs SET state = ?, tries = 0, taken = 0, worker = '' WHERE id = ? AND state IN (?, ?)",
                (JobState.WAITING, job_id, JobState.FAILED, JobState.QUARANTINED),
            )

    # --- the pool's side ----------------------------------------------------------------------------------------

    def hold(self, least: Priority) -> None:
        """Lease jobs of this priority and more urgent ones only; the others wait until this is taken back."""
        self._least = least

    def lease(self, worker: str, lease_s: float, without: Collection[str] = ()) -> Job | None:
        """Give a worker the most urgent job, the oldest of those, for a time; None when none waits.

        Args:
            worker: who gets it.
            lease_s: the time, in seconds.
            without: ids of jobs that it cannot do.
        """
        waiting = "SELECT 1 FROM jobs WHERE state = ? AND priority <= ? LIMIT 1"
        if not self._read(waiting, JobState.WAITING, self._least):
            return None
        with self._changing() as base:
            row = base.execute(
                "SELECT id, key, kind, payload, tries FROM jobs WHERE state = ? AND priority <= ?"
                " AND id NOT IN (SELECT value FROM json_each(?)) ORDER BY priority, submitted LIMIT 1",
                (JobState.WAITING, self._least, json.dumps(list(without))),
            ).fetchone()
            if row is None:
                return None
            base.execute(
                "UPDATE jobs SET state = ?, worker = ?, tries = tries + 1, lease_until = ? WHERE id = ?",
                (JobState.LEASED, worker, time.time() + lease_s, row[0]),
            )
            return Job(id=row[0], key=row[1], kind=row[2], payload=row[3], attempt=row[4] + 1)

    def renew(self, job_id: str, worker: str, lease_s: float) -> bool:
        """Prolong a lease; False when the job is no longer this worker's."""
        with self._changing() as base:
            return _changed(
                base,
                "UPDATE jobs SET lease_until = ? WHERE id = ? AND worker = ? AND state = ?",
                (time.time() + lease_s, job_id, worker, JobState.LEASED),
            )

    def done(self, job_id: str, result: bytes, *, cpu_seconds: float = 0.0, worker: str = "") -> bool:
        """Keep a job's result, from whichever worker it comes first; False when it had ended before."""
        _check_size(f"The result of job {job_id}", result)
        with self._changing() as base:
            return _changed(
                base,
                "UPDATE jobs SET state = ?, result = ?, cpu_seconds = ?, ended = ?, payload = x'',"
                " worker = CASE ? WHEN '' THEN worker ELSE ? END WHERE id = ? AND state IN (?, ?)",
                (JobState.DONE, result, cpu_seconds, time.time(), worker, worker, job_id, *_OPEN),
            )

    def failed(
        self, job_id: str, reason: str, *, final: bool, worker: str, cpu_seconds: float = 0.0
    ) -> JobState | None:
        """Note that a worker's try failed: for good, or to be tried again until the tries are used up.

        Returns:
            The job's new state; None when it is not leased by this worker (the news is late) and nothing changed.
        """
        with self._changing() as base:
            row = base.execute(
                "SELECT tries, reasons FROM jobs WHERE id = ? AND worker = ? AND state = ?",
                (job_id, worker, JobState.LEASED),
            ).fetchone()
            if row is None:
                return None
            state = JobState.FAILED if final else JobState.WAITING
            if not final and row[0] >= self._max_tries:
                state = JobState.QUARANTINED
            base.execute(
                "UPDATE jobs SET state = ?, reasons = ?, ended = ?, cpu_seconds = ? WHERE id = ?",
                (state, json.dumps([*json.loads(row[1]), reason]), time.time(), cpu_seconds, job_id),
            )
            return state

    def requeue(self, worker: str | None = None) -> int:
        """Take jobs back without counting the try, because the fault is not theirs; return how many.

        Args:
            worker: whose jobs; None for everybody's, as when a pool starts or closes.
        """
        with self._changing() as base:
            return base.execute(
                "UPDATE jobs SET state = ?, tries = tries - 1, worker = ''"
                " WHERE state = ? AND worker = coalesce(?, worker)",
                (JobState.WAITING, JobState.LEASED, worker),
            ).rowcount

    def expired(self) -> list[tuple[str, str]]:
        """Return the leases that have run out, as pairs of job id and worker."""
        query = "SELECT id, worker FROM jobs WHERE state = ? AND lease_until < ?"
        return [(row[0], row[1]) for row in self._read(query, JobState.LEASED, time.time())]

    # --- accounts -----------------------------------------------------------------------------------------------

    def counts(self) -> dict[JobState, int]:
        """Return the number of jobs in every state."""
        found = dict(self._read("SELECT state, count(*) FROM jobs GROUP BY state"))
        return {state: found.get(state.value, 0) for state in JobState}

    def spend(self, cpu_seconds: float) -> None:
        """Add CPU time to the account of today (UTC)."""
        with self._changing() as base:
            base.execute(
                "INSERT INTO spent VALUES (?, ?)"
                " ON CONFLICT (day) DO UPDATE SET cpu_seconds = cpu_seconds + excluded.cpu_seconds",
                (_today(), cpu_seconds),
            )

    def spent_today(self) -> float:
        """Return the CPU time of today (UTC), in seconds."""
        rows = self._read("SELECT cpu_seconds FROM spent WHERE day = ?", _today())
        return float(rows[0][0]) if rows else 0.0

    def prune(self, older_than_s: float) -> int:
        """Forget results that were taken and are older than this; failures stay as a record. Return how many."""
        with self._changing() as base:
            before = time.time() - older_than_s
            return base.execute(
                "DELETE FROM jobs WHERE state = ? AND taken = 1 AND ended < ?", (JobState.DONE, before)
            ).rowcount

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._base.close()


_OPEN: Final = (JobState.WAITING, JobState.LEASED)


def _changed(base: sqlite3.Connection, query: str, values: tuple[Any, ...]) -> bool:
    return base.execute(query, values).rowcount > 0


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _check_size(what: str, data: bytes) -> None:
    if len(data) > MAX_PAYLOAD:
        raise JobError(f"{what} has {len(data)} bytes; at most {MAX_PAYLOAD} are allowed.")


def _result(row: tuple[Any, ...]) -> JobResult:
    job_id, key, kind, state, result, reasons, tries, cpu_seconds, worker = row
    return JobResult(
        job_id=job_id,
        key=key,
        kind=kind,
        state=JobState(state),
        result=result,
        reasons=tuple(json.loads(reasons)),
        tries=tries,
        cpu_seconds=cpu_seconds,
        worker=worker,
    )
