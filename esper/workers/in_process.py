"""The twin of the process pool that needs no worker process: for tests, and for work that can be trusted."""

import contextlib
import shutil
import threading
from pathlib import Path
from typing import Final, final

from esper.leyline.envelope import Priority
from esper.leyline.errors import StoreError
from esper.workers.contracts import JobModule, JobResult, Pool, PoolStats, WorkerStatus
from esper.workers.desk import Desk
from esper.workers.execute import Answer, execute
from esper.workers.journal import JobJournal

_LOOK_S: Final = 0.02
_FOREVER_S: Final = 1e9
_WORKER: Final = "thread"


@final
class InProcessPool(Pool):
    """Does jobs in one thread of this process, by the module's `work` where it has one.

    Without `work`, a job's command runs in the sandbox as in any pool.

    Args:
        name: what the pool is called.
        module: the module of jobs.
        folder: folder for the journal and the jobs' files.
        max_tries: a job is put in quarantine when this many tries have failed.
        cpu_budget_s: CPU time that the jobs may spend in a day (UTC), in seconds; None for no bound.

    Raises:
        StoreError: the journal cannot be opened.
    """

    def __init__(
        self,
        name: str,
        module: JobModule,
        *,
        folder: str | Path,
        max_tries: int = 3,
        cpu_budget_s: float | None = None,
    ) -> None:
        """Start the thread."""
        self._name, self._module, self._budget = name, module, cpu_budget_s
        self._folder = Path(folder).resolve()
        self._journal = JobJournal(self._folder / "jobs.sqlite", max_tries=max_tries)
        self._journal.requeue()
        self._desk = Desk(self._journal)
        self._doing = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"pool-{name}", daemon=True)
        self._thread.start()

    def submit(self, key: str, kind: str, payload: bytes, *, priority: int = Priority.NORMAL) -> str:
        """Take a job; see `Pool.submit`."""
        return self._desk.submit(key, kind, payload, priority)

    def poll(self, timeout_s: float) -> list[JobResult]:
        """Return the jobs that have ended; see `Pool.poll`."""
        return self._desk.poll(timeout_s)

    def stats(self) -> PoolStats:
        """Return what the pool holds and does at this instant."""
        return PoolStats(
            name=self._name,
            jobs=self._journal.counts(),
            workers=(WorkerStatus(name=_WORKER, job=self._doing),),
            cpu_seconds_today=self._journal.spent_today(),
            cpu_budget_s=self._budget,
        )

    def close(self) -> None:
        """Give up the job in hand and end the thread; what has not ended waits in the journal."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._desk.close()
        self._thread.join()
        with contextlib.suppress(StoreError):
            self._journal.requeue()
        self._journal.close()
        shutil.rmtree(self._folder / "workers", ignore_errors=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if not self._one():
                    self._stop.wait(_LOOK_S)
            except StoreError:
                # A full disk may be emptied; the job keeps its lease until the pool starts anew.
                self._stop.wait(1.0)

    def _one(self) -> bool:
        """Do one job; False when there is none to do."""
        if self._budget is not None and self._journal.spent_today() >= self._budget:
            return False
        job = self._journal.lease(_WORKER, _FOREVER_S)
        if job is None:
            return False
        self._doing = job.id
        answer = execute(self._module, job, self._folder / "workers" / job.id, self._stop, here=True)
        if not self._stop.is_set():
            self._keep(job.id, answer)
        self._doing = ""
        return True

    def _keep(self, job_id: str, answer: Answer) -> None:
        if answer.result is not None:
            self._journal.done(job_id, answer.result, cpu_seconds=answer.cpu_seconds, worker=_WORKER)
        else:
            # There is no other worker here that a job could fit.
            final = answer.final or answer.unfit
            self._journal.failed(job_id, answer.reason, final=final, worker=_WORKER, cpu_seconds=answer.cpu_seconds)
        self._journal.spend(answer.cpu_seconds)
        self._desk.tell()
