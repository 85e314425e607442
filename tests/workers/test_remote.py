import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from esper.leyline.envelope import Priority
from esper.leyline.events import SecurityAlert, Violation, WorkerDied
from esper.oona.keys import CurveKeys, admit
from esper.workers import wire
from esper.workers.contracts import JobResult, JobState, Pool
from esper.workers.foreman import PoolConfig
from esper.workers.pool import ProcessPool
from tests.workers import jobs
from tests.workers.network import Network, two_networks

pytestmark = pytest.mark.slow

ROOT = str(Path(__file__).parents[2])
JOBS = "tests.workers.jobs"
QUICK = PoolConfig(beat_s=0.2, lease_s=4.0, patience_s=8.0, max_tries=100)
# A worker that is stopped for as long as another takes to start and to do its job has not lost its pool.
PATIENT = replace(QUICK, patience_s=60.0)


class Keys:
    """The pool's pair, a worker's pair that is admitted, and one that is not."""

    def __init__(self, folder: Path) -> None:
        worker, stranger, pool = CurveKeys.generate(), CurveKeys.generate(), CurveKeys.generate()
        self.worker, self.stranger = worker.save(folder / "worker.key"), stranger.save(folder / "stranger.key")
        self.stranger_public = stranger.public
        admit(folder / "admitted", "worker", worker.public)
        self.pool = pool.admitting(folder / "admitted")


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys")


@contextmanager
def joined(
    address: str, key: Path, server: str, *, before: tuple[str, ...] = (), name: str = "far", **variables: str
) -> Iterator[Any]:
    command = [*before, sys.executable, "-P", "-m", "esper.workers.worker", "--connect", address, "--module", JOBS]
    command += ["--key", str(key), "--server-key", server, "--name", name, "--patience", "8"]
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", **variables}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as worker:
        try:
            yield worker
        finally:
            worker.send_signal(signal.SIGCONT)
            worker.terminate()


def gather(pool: Pool, count: int) -> list[JobResult]:
    results: list[JobResult] = []
    end = time.monotonic() + 60.0
    while len(results) < count and time.monotonic() < end:
        results += pool.poll(0.5)
    return results


def until(condition: Any, patience_s: float = 60.0) -> Any:
    end = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


def test_a_stopped_remote_worker_loses_its_job_and_its_late_answer_changes_nothing(
    tmp_path: Path, mark: str, keys: Keys
) -> None:
    events: list[Any] = []
    with ProcessPool(
        "t", JOBS, 0, folder=tmp_path / "pool", listen="tcp://127.0.0.1:*", keys=keys.pool, config=PATIENT,
        on_event=events.append,
    ) as pool, joined(pool.address, keys.worker, keys.pool.public, name="first") as first:  # fmt: skip
        job_id = pool.submit("key", "sleep", jobs.payload("sleep", seconds=1.0))
        until(lambda: any(worker.job == job_id for worker in pool.stats().workers))
        first.send_signal(signal.SIGSTOP)
        until(lambda: events)
        assert (events[0].worker_id, events[0].job_id, events[0].requeued) == ("remote/first", job_id, True)
        with joined(pool.address, keys.worker, keys.pool.public, name="second"):
            (result,) = gather(pool, 1)
            assert (result.job_id, result.worker) == (job_id, "remote/second")
        first.send_signal(signal.SIGCONT)
        until(lambda: any(worker.name == "remote/first" for worker in pool.stats().workers))
        pool.submit("next", "echo", jobs.payload("echo", say="again"))
        (after,) = gather(pool, 1)
        assert (after.key, after.result) == ("next", b"again")
        assert pool.poll(0.5) == []
    assert all(isinstance(event, WorkerDied) for event in events)


def test_a_remote_worker_outlives_a_pool_that_starts_again_and_ends_when_none_does(
    tmp_path: Path, mark: str, keys: Keys
) -> None:
    def open_pool(listen: str) -> ProcessPool:
        return ProcessPool("t", JOBS, 0, folder=tmp_path / "pool", listen=listen, keys=keys.pool, config=QUICK)

    with open_pool("tcp://127.0.0.1:*") as pool:
        address = pool.address
        context: zmq.Context[Any] = zmq.Context()
        with joined(address, keys.worker, keys.pool.public) as worker:
            until(lambda: pool.stats().workers)
            # As a killed pool does, this one goes without a word.
            pool._foreman.roster.leave("remote/far")
            pool.close()
            with open_pool(address) as second:
                second.submit("key", "echo", jobs.payload("echo", say="again"))
                assert gather(second, 1)[0].result == b"again"
                second._foreman.roster.leave("remote/far")
            assert worker.wait(30) == 3
            assert b"silent" in worker.stderr.read()
        context.destroy(linger=0)


def test_who_does_not_show_the_token_gets_no_job(tmp_path: Path, mark: str) -> None:
    events: list[Any] = []
    context: zmq.Context[Any] = zmq.Context()
    with ProcessPool("t", JOBS, 0, folder=tmp_path, config=QUICK, on_event=events.append) as pool:
        pool.submit("key", "echo", jobs.payload("echo"))
        from esper.workers.pool import _endpoint

        dealer = context.socket(zmq.DEALER)
        dealer.connect(_endpoint(pool._own))
        dealer.send_multipart(wire.pack(wire.HELLO, name="intruder", token="guess", job=""))
        dealer.send_multipart([wire.VERSION, b"hello", b"\xc1"])
        until(lambda: len(events) >= 2)
        assert not dealer.poll(500)
        assert pool.stats().workers == ()
    context.destroy(linger=0)
    assert {event.violation for event in events} == {Violation.PERMISSION}
    assert events[0].subject == "intruder"


@pytest.fixture
def network() -> Iterator[Network]:
    with two_networks() as made:
        yield made


def test_a_job_for_another_machine_waits_for_it_and_is_told_of(tmp_path: Path, mark: str, keys: Keys) -> None:
    """The worker that does not fit hands the job back, does what is for anybody, and is not asked again."""
    events: list[Any] = []
    with (
        ProcessPool(
            "t", JOBS, 0, folder=tmp_path / "pool", listen="tcp://127.0.0.1:*", keys=keys.pool, config=QUICK,
            on_event=events.append,
        ) as pool,
        joined(pool.address, keys.worker, keys.pool.public, name="strange", **{jobs.STRANGE: "yes"}),
    ):  # fmt: skip
        pool.submit("one", "echo", jobs.payload("echo", say="particular", particular=True))
        pool.submit("two", "echo", jobs.payload("echo", say="any"), priority=Priority.LOW)
        (any_,) = gather(pool, 1)
        assert (any_.result, any_.worker) == (b"any", "remote/strange")
        assert pool.poll(1.0) == [] and pool.stats().jobs[JobState.WAITING] == 1
        with joined(pool.address, keys.worker, keys.pool.public, name="right"):
            (found,) = gather(pool, 1)
    assert (found.result, found.worker, found.tries, found.reasons) == (b"particular", "remote/right", 1, ())
    (alert,) = events
    assert isinstance(alert, SecurityAlert)
    assert (alert.violation, alert.subject) == (Violation.FINGERPRINT, "remote/strange")
    assert "made for another machine" in alert.detail


def test_a_worker_joins_from_another_network_with_its_key_and_a_stranger_does_not(
    tmp_path: Path, mark: str, keys: Keys, network: Network
) -> None:
    events: list[Any] = []
    with ProcessPool(
        "t", JOBS, 0, folder=tmp_path / "pool", listen="tcp://10.91.0.1:*", keys=keys.pool, config=QUICK,
        on_event=events.append,
    ) as pool:  # fmt: skip
        pool.submit("key", "echo", jobs.payload("echo", say="from afar"))
        with joined(pool.address, keys.stranger, keys.pool.public, before=network.there):
            alert = until(lambda: events)[0]
            assert isinstance(alert, SecurityAlert)
            assert (alert.subject, alert.violation) == (keys.stranger_public, Violation.PERMISSION)
            assert pool.poll(0.5) == []
            assert pool.stats().workers == ()
        with joined(pool.address, keys.worker, keys.pool.public, before=network.there):
            (result,) = gather(pool, 1)
    assert (result.result, result.worker) == (b"from afar", "remote/far")
