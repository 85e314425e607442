"""Starts a process for every row, so many at a time; what they say goes to a file."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Final, NamedTuple

from esper.bench.rows import JOB_FILE, ROW_FILE, Job, Row, Rows, write
from esper.leyline.errors import OutputError

WORKER: Final = (sys.executable, "-m", "esper.bench.worker")
LOG: Final = "log.txt"

_KILL_AFTER_S: Final = 5.0


class Failed(NamedTuple):
    """A row that could not be made.

    Args:
        why: in a line.
        log: everything that its process said.
    """

    why: str
    log: Path


Result = Row | Failed


class Pool:
    """Makes rows in processes of their own, so that the memory and the time of each are its own.

    Args:
        rows: the rows that are there; each is added as soon as it is made.
        folder: of the runs, one folder each.
        jobs: rows at a time.
        worker: command that makes the row of the folder that is its last argument.
    """

    def __init__(self, rows: Rows, folder: Path, *, jobs: int = 1, worker: Sequence[str] = WORKER) -> None:
        """Start nothing yet."""
        self.rows, self.folder, self.jobs, self.worker = rows, folder, jobs, tuple(worker)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped, self._lock = False, Lock()

    def run(self, first: Sequence[Job], then: Callable[[Job, Row], Sequence[Job]]) -> Iterator[tuple[Job, Result]]:
        """Make rows and yield each when it is done; however this ends, no process is left.

        Args:
            first: what can be made at once.
            then: what a row makes possible.
        """
        with ThreadPoolExecutor(self.jobs) as threads:
            waiting: dict[Future[Result], Job] = {threads.submit(self._make, job): job for job in first}
            try:
                while waiting:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        job, result = waiting.pop(future), future.result()
                        more = then(job, result) if isinstance(result, dict) else ()
                        waiting |= {threads.submit(self._make, job): job for job in more}
                        yield job, result
            finally:
                self._stop()
                threads.shutdown(wait=True, cancel_futures=True)

    def _make(self, job: Job) -> Result:
        folder = self.folder / f"{job.arm}-{job.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        write(folder / JOB_FILE, {"config": job.config, "work": job.work})
        started = perf_counter()
        status = self._work(folder)
        if status != 0 or not (folder / ROW_FILE).is_file():
            return Failed(_why(status, folder / LOG), folder / LOG)
        row: Row = json.loads((folder / ROW_FILE).read_text(encoding="utf-8"))
        return self.rows.keep(job, row | {"process_seconds": perf_counter() - started})

    def _work(self, folder: Path) -> int:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (folder / LOG).open("wb") as log:
            with self._lock:
                if self._stopped:
                    return -signal.SIGTERM
                # In a group of its own Ctrl-C does not reach it, and all that it starts can be ended with it. A session
                # of its own would also shed the niceness of the bench where the kernel schedules by session.
                process = subprocess.Popen(
                    [*self.worker, str(folder)],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    process_group=0,
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                self._running.discard(process)

    def _stop(self) -> None:
        """End every process that still runs: first asked, then forced."""
        with self._lock:
            self._stopped, running = True, list(self._running)
        for process in running:
            _signal(process, signal.SIGTERM)
        deadline = perf_counter() + _KILL_AFTER_S
        for process in running:
            try:
                process.wait(max(0.0, deadline - perf_counter()))
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process and to all of its group."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _why(status: int, log: Path) -> str:
    """Return the last words of a process, or the signal that ended it."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}" + ("; was there enough memory?" if name == "SIGKILL" else "")
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError as error:
        raise OutputError(f"cannot read {log}: {error.strerror or error}.") from error
    told = next((line for line in reversed(lines) if line), f"exit status {status}")
    return told.removeprefix("error: ")
