import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from esper.leyline.events import WorkerDied
from esper.workers.contracts import JobResult, JobState
from esper.workers.foreman import PoolConfig
from esper.workers.pool import ProcessPool
from tests.workers import jobs

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("ESPER_SOAK", "3"))
ROOT = str(Path(__file__).parents[2])
JOBS = "tests.workers.jobs"
# Workers are killed here far more often than jobs could be to blame for.
HARDY = PoolConfig(beat_s=0.2, lease_s=20.0, patience_s=60.0, max_tries=1000)


def workers(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children():
        try:
            if "esper.workers.worker" in process.cmdline() and process.environ().get(jobs.MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(condition: Any, patience_s: float = 60.0) -> Any:
    end = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


def test_every_job_is_done_once_though_workers_are_killed(tmp_path: Path, mark: str) -> None:
    events: list[Any] = []
    chance = random.Random(1)
    with ProcessPool("t", JOBS, 2, folder=tmp_path, config=HARDY, on_event=events.append) as pool:
        for turn in range(ROUNDS):
            keys = {pool.submit(f"{turn}-{n}", "sleep", jobs.payload("sleep", seconds=0.1)): n for n in range(4)}
            time.sleep(chance.random())
            victim = chance.choice(until(lambda: workers(mark)))
            victim.kill()
            results: list[JobResult] = []
            end = time.monotonic() + 90.0
            while len(results) < len(keys) and time.monotonic() < end:
                results += pool.poll(0.5)
            results += pool.poll(0.2)
            assert sorted(result.job_id for result in results) == sorted(keys), (turn, pool.stats())
            assert {result.result for result in results} == {b"slept"}
        assert pool.stats().jobs[JobState.DONE] == 4 * ROUNDS
        until(lambda: pool.stats().deaths >= ROUNDS)
    assert len(events) >= ROUNDS
    assert all(isinstance(event, WorkerDied) and event.exit_code == -9 for event in events)


def test_a_worker_killed_in_a_job_takes_the_command_along_and_the_job_is_tried_again(tmp_path: Path, mark: str) -> None:
    events: list[Any] = []
    with ProcessPool("t", JOBS, 1, folder=tmp_path, config=HARDY, on_event=events.append) as pool:
        job_id = pool.submit("key", "escape", jobs.payload("escape", wait=True))
        worker = until(lambda: workers(mark))[0]
        # The keeper, the first process of the namespace, the command and what the command left behind.
        until(lambda: len(worker.children(recursive=True)) >= 4)
        family = worker.children(recursive=True)
        worker.kill()
        _, alive = psutil.wait_procs(family, timeout=10.0)
        assert not alive
        event = until(lambda: events)[0]
        assert (event.job_id, event.attempt, event.exit_code, event.requeued) == (job_id, 1, -9, True)


def test_a_job_whose_worker_always_dies_is_put_in_quarantine(tmp_path: Path, mark: str) -> None:
    config = PoolConfig(beat_s=0.2, lease_s=20.0, patience_s=60.0)
    events: list[Any] = []
    with ProcessPool("t", JOBS, 1, folder=tmp_path, config=config, on_event=events.append) as pool:
        job_id = pool.submit("poison", "sleep", jobs.payload("sleep", seconds=1000))
        for turn in range(3):
            until(lambda: any(worker.job == job_id for worker in pool.stats().workers))
            workers(mark)[0].kill()
            until(lambda turn=turn: len(events) > turn)
        (result,) = pool.poll(30.0)
        assert result.state is JobState.QUARANTINED
        assert len(result.reasons) == 3
        assert all("signal 9" in reason for reason in result.reasons)
        assert [event.requeued for event in events] == [True, True, False]
        pool.submit("next", "echo", jobs.payload("echo", say="alive"))
        assert pool.poll(60.0)[0].result == b"alive"


def test_a_stopped_worker_is_replaced_and_its_job_done_once(tmp_path: Path, mark: str) -> None:
    config = PoolConfig(beat_s=0.2, lease_s=4.0, patience_s=60.0, max_tries=100)
    with ProcessPool("t", JOBS, 1, folder=tmp_path, config=config) as pool:
        for turn in range(ROUNDS):
            job_id = pool.submit(f"key{turn}", "sleep", jobs.payload("sleep", seconds=0.5))
            until(lambda job_id=job_id: any(worker.job == job_id for worker in pool.stats().workers))
            workers(mark)[0].send_signal(signal.SIGSTOP)
            results: list[JobResult] = []
            end = time.monotonic() + 60.0
            while not results and time.monotonic() < end:
                results += pool.poll(0.5)
            assert [(result.job_id, result.result) for result in results] == [(job_id, b"slept")]
        assert pool.stats().deaths >= ROUNDS


def test_a_worker_that_hangs_before_its_first_word_is_replaced(tmp_path: Path, mark: str) -> None:
    config = PoolConfig(beat_s=0.2, lease_s=4.0, patience_s=8.0)
    with ProcessPool("t", JOBS, 1, folder=tmp_path, config=config) as pool:
        until(lambda: workers(mark))[0].send_signal(signal.SIGSTOP)
        assert not pool.stats().workers, "it was too late to stop it"
        pool.submit("key", "echo", jobs.payload("echo", say="alive"))
        assert [result.result for result in pool.poll(90.0)] == [b"alive"]
        assert pool.stats().deaths >= 1


def start(folder: Path, count: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.workers.submitter", str(folder), str(count), "2"]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE)


def test_every_job_is_seen_once_though_the_pool_itself_is_killed(tmp_path: Path, mark: str) -> None:
    chance, count = random.Random(2), 6 * ROUNDS
    for _ in range(ROUNDS):
        with start(tmp_path, count) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"ready\n"
            below = psutil.Process(parent.pid)
            until(lambda below=below: len(below.children(recursive=True)) >= 2 or parent.poll() is not None)
            time.sleep(3.0 * chance.random())
            family = below.children(recursive=True) if parent.poll() is None else []
            parent.kill()
        _, alive = psutil.wait_procs(family, timeout=10.0)
        assert not alive, [process.cmdline() for process in alive]
    with start(tmp_path, count) as parent:
        assert parent.wait(150) == 0
    lines = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    assert sorted(words[0] for words in lines) == sorted(f"key{number}" for number in range(count))
    assert {tuple(words[1:]) for words in lines} == {("DONE", "slept")}
    assert not (tmp_path / "workers").exists()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk takes root on Linux")
def test_a_full_disk_delays_jobs_and_loses_none(tmp_path: Path, mark: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.decode().strip()}")
    try:
        with ProcessPool("t", JOBS, 1, folder=disk, config=HARDY) as pool:
            ids = [pool.submit(f"key{n}", "sleep", jobs.payload("sleep", seconds=0.3)) for n in range(3)]
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
            time.sleep(3.0)
            filler.unlink()
            results: list[JobResult] = []
            end = time.monotonic() + 60.0
            while len(results) < 3 and time.monotonic() < end:
                results += pool.poll(0.5)
            assert sorted(result.job_id for result in results) == sorted(ids)
            assert all(result.ok for result in results)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
