"""The submitter's side of every pool: takes jobs in and hands results out."""

import threading
import time
from typing import final

from esper.leyline.errors import JobError
from esper.workers.contracts import JobResult
from esper.workers.journal import JobJournal


@final
class Desk:
    """Hands out each result once, and counts it as taken when the next ones are asked for.

    Args:
        journal: the jobs.
    """

    def __init__(self, journal: JobJournal) -> None:
        """Open the desk."""
        self._journal = journal
        self._news = threading.Condition()
        self._handed: set[str] = set()
        self._closed = False

    def submit(self, key: str, kind: str, payload: bytes, priority: int) -> str:
        """Take a job in."""
        with self._news:
            self._check_open()
            job_id = self._journal.submit(key, kind, payload, priority)
            # Whoever asks again wants the result again.
            self._handed.discard(job_id)
            self._news.notify_all()
            return job_id

    def poll(self, timeout_s: float) -> list[JobResult]:
        """Hand out the results that have come, waiting for one up to a time."""
        until = time.monotonic() + timeout_s
        with self._news:
            self._check_open()
            if self._handed:
                self._journal.take(sorted(self._handed))
                self._handed.clear()
            while not (results := self._journal.untaken()):
                left = until - time.monotonic()
                if left <= 0 or self._closed:
                    return []
                self._news.wait(left)
            self._handed = {result.job_id for result in results}
            return results

    def tell(self) -> None:
        """Wake whoever waits for a result."""
        with self._news:
            self._news.notify_all()

    def close(self) -> None:
        """Take no more jobs; what was handed out last is handed out again by the next pool."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise JobError("The pool is closed; jobs are submitted and polled before that.")
