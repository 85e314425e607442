import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from esper.leyline.events import SecurityAlert, Violation, WorkerDied
from esper.oona.keys import CurveKeys, admit
from esper.workers import wire
from esper.workers.contracts import JobResult, Pool
from esper.workers.foreman import PoolConfig
from esper.workers.pool import ProcessPool
from tests.workers import jobs

pytestmark = pytest.mark.slow

ROOT = str(Path(__file__).parents[2])
JOBS = "tests.workers.jobs"
QUICK = PoolConfig(beat_s=0.2, lease_s=4.0, patience_s=8.0, max_tries=100)


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
def joined(address: str, key: Path, server: str, *, before: tuple[str, ...] = (), name: str = "far") -> Iterator[Any]:
    command = [*before, sys.executable, "-P", "-m", "esper.workers.worker", "--connect", address, "--module", JOBS]
    command += ["--key", str(key), "--server-key", server, "--name", name, "--patience", "8"]
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
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
        "t", JOBS, 0, folder=tmp_path / "pool", listen="tcp://127.0.0.1:*", keys=keys.pool, config=QUICK,
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
        dealer.send_multipart([b"workers/1", b"hello", b"\xc1"])
        until(lambda: len(events) >= 2)
        assert not dealer.poll(500)
        assert pool.stats().workers == ()
    context.destroy(linger=0)
    assert {event.violation for event in events} == {Violation.PERMISSION}
    assert events[0].subject == "intruder"


class Network:
    """Two network namespaces joined by a cable: 10.91.0.1 here, 10.91.0.2 there."""

    def __init__(self) -> None:
        self.name = f"esper{uuid.uuid4().hex[:6]}"
        self.near, self.far = f"n{self.name}"[:12], f"f{self.name}"[:12]

    def run(self, *words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True)
        if done.returncode:
            raise OSError(done.stderr.decode().strip())

    def __enter__(self) -> "Network":
        self.run("netns", "add", self.name)
        self.run("link", "add", self.near, "type", "veth", "peer", "name", self.far, "netns", self.name)
        self.run("addr", "add", "10.91.0.1/24", "dev", self.near)
        self.run("link", "set", self.near, "up")
        self.run("-n", self.name, "addr", "add", "10.91.0.2/24", "dev", self.far)
        self.run("-n", self.name, "link", "set", self.far, "up")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["ip", "link", "del", self.near], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network()
    try:
        made.__enter__()
    except OSError as error:
        made.__exit__()
        pytest.skip(f"no second network namespace: {error}")
    yield made
    made.__exit__()


def test_a_worker_joins_from_another_network_with_its_key_and_a_stranger_does_not(
    tmp_path: Path, mark: str, keys: Keys, network: Network
) -> None:
    events: list[Any] = []
    there = ("ip", "netns", "exec", network.name)
    with ProcessPool(
        "t", JOBS, 0, folder=tmp_path / "pool", listen="tcp://10.91.0.1:*", keys=keys.pool, config=QUICK,
        on_event=events.append,
    ) as pool:  # fmt: skip
        pool.submit("key", "echo", jobs.payload("echo", say="from afar"))
        with joined(pool.address, keys.stranger, keys.pool.public, before=there):
            alert = until(lambda: events)[0]
            assert isinstance(alert, SecurityAlert)
            assert (alert.subject, alert.violation) == (keys.stranger_public, Violation.PERMISSION)
            assert pool.poll(0.5) == []
            assert pool.stats().workers == ()
        with joined(pool.address, keys.worker, keys.pool.public, before=there):
            (result,) = gather(pool, 1)
    assert (result.result, result.worker) == (b"from afar", "remote/far")
