"""What a pool of workers promises, and what a module of jobs must offer."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum, unique
from pathlib import Path
from typing import Protocol, Self

from esper.leyline.envelope import Priority
from esper.leyline.events import SecurityAlert, WorkerDied
from esper.workers.limits import SandboxOutcome

Event = WorkerDied | SecurityAlert
"""What a pool tells its owner of."""

OnEvent = Callable[[Event], None]
"""Called from the pool's own thread; it must return soon and must not raise."""


@unique
class JobState(StrEnum):
    """Where a job stands."""

    WAITING = "WAITING"
    LEASED = "LEASED"
    DONE = "DONE"
    FAILED = "FAILED"
    QUARANTINED = "QUARANTINED"


ENDED = frozenset({JobState.DONE, JobState.FAILED, JobState.QUARANTINED})
"""States in which a job has a result."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work.

    Args:
        id: unique id.
        key: what the submitter calls it; the same key is the same job.
        kind: what sort of work it is, for people.
        payload: input, as its module reads it.
        attempt: how many times it has been tried, this one included, from 1.
    """

    id: str
    key: str
    kind: str
    payload: bytes = field(repr=False)
    attempt: int = 1


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """How a job ended.

    Args:
        job_id: the job.
        key: what its submitter calls it.
        kind: what sort of work it was.
        state: DONE, FAILED (for good, by its own account) or QUARANTINED (tried too often).
        result: what its module collected; empty unless DONE.
        reasons: why each try failed, in order.
        tries: how many times it was tried.
        cpu_seconds: CPU time of the last try, in seconds.
        worker: who did it.
    """

    job_id: str
    key: str
    kind: str
    state: JobState
    result: bytes = field(default=b"", repr=False)
    reasons: tuple[str, ...] = ()
    tries: int = 1
    cpu_seconds: float = 0.0
    worker: str = ""

    @property
    def ok(self) -> bool:
        """Whether the job is DONE."""
        return self.state is JobState.DONE


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """One worker as its pool sees it.

    Args:
        name: the worker.
        job: id of the job that it does; empty for none.
        silent_s: time since it was last heard, in seconds.
        remote: whether somebody else started it.
    """

    name: str
    job: str = ""
    silent_s: float = 0.0
    remote: bool = False


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """A pool at one instant.

    Args:
        name: the pool.
        jobs: number of jobs by state.
        workers: those that are connected.
        deaths: workers that died since the pool started.
        cpu_seconds_today: CPU time that its jobs spent since midnight UTC, in seconds.
        cpu_budget_s: what they may spend in a day, in seconds; None for no bound.
    """

    name: str
    jobs: dict[JobState, int]
    workers: tuple[WorkerStatus, ...] = ()
    deaths: int = 0
    cpu_seconds_today: float = 0.0
    cpu_budget_s: float | None = None

    @property
    def over_budget(self) -> bool:
        """Whether jobs wait for the next day."""
        return self.cpu_budget_s is not None and self.cpu_seconds_today >= self.cpu_budget_s


class JobModule(Protocol):
    """A module of jobs: what is run for a payload, and what is made of its outcome.

    It may also offer `limits(payload) -> Limits`, `environment(payload) -> Mapping[str, str]` (further variables of
    the sandbox), and `work(folder) -> None` (what the command does, for `InProcessPool`).
    """

    def prepare(self, payload: bytes, folder: Path) -> list[str]:
        """Write the inputs into the folder and return the command that the sandbox runs there."""
        ...

    def collect(self, folder: Path, outcome: SandboxOutcome) -> bytes:
        """Return the result; raise `JobError` when the job failed for good. Any other error is tried again.

        `WrongFingerprint` says that the job is good and this machine is not the one for it: another worker gets it.
        """
        ...


class Pool(ABC):
    """Does jobs elsewhere, each to its end exactly once as its submitter sees it."""

    @abstractmethod
    def submit(self, key: str, kind: str, payload: bytes, *, priority: int = Priority.NORMAL) -> str:
        """Take a job and return its id; a job with this key that is known already is not done twice.

        Once this returns, the job survives any crash. A key whose result was taken gives the same result again.

        Args:
            key: what the submitter calls the job.
            kind: what sort of work it is, for people.
            payload: input of the job, at most 64 MiB.
            priority: lower ones first, e.g. of `leyline.envelope.Priority`.
        """

    @abstractmethod
    def poll(self, timeout_s: float) -> list[JobResult]:
        """Return the jobs that have ended since the last call, waiting up to `timeout_s` seconds for one.

        What one call returned counts as taken at the next call. After a crash in between it is returned again, so
        the handling of a result should bear to be repeated.
        """

    @abstractmethod
    def stats(self) -> PoolStats:
        """Return what the pool holds and does at this instant."""

    @abstractmethod
    def close(self) -> None:
        """End every worker; jobs that have not ended wait in the journal. May be called twice."""

    def __enter__(self) -> Self:
        """Return the pool, which is closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pool."""
        self.close()
