import logging
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from esper.leyline.errors import ConfigError, JobError, StoreError
from esper.leyline.events import WorkerDied
from esper.workers import checks
from esper.workers.checks import check_pool
from esper.workers.contracts import JobResult, JobState, Pool
from esper.workers.foreman import PoolConfig
from esper.workers.in_process import InProcessPool
from esper.workers.pool import ProcessPool
from tests.workers import jobs

JOBS = "tests.workers.jobs"
PATIENT = PoolConfig(beat_s=0.5, lease_s=30.0, patience_s=60.0)


def gather(pool: Pool, count: int, patience_s: float = 90.0) -> list[JobResult]:
    results: list[JobResult] = []
    until = time.monotonic() + patience_s
    while len(results) < count and time.monotonic() < until:
        results += pool.poll(1.0)
    assert len(results) == count, (results, pool.stats())
    return results


def test_in_process_pool_keeps_the_contract(tmp_path: Path) -> None:
    check_pool(lambda folder: InProcessPool("twin", checks, folder=folder), tmp_path)


def test_in_process_pool_keeps_the_contract_with_commands(tmp_path: Path, mark: str) -> None:
    module = ModuleType("without_work")
    for name in ("prepare", "collect", "limits"):
        setattr(module, name, getattr(checks, name))
    check_pool(lambda folder: InProcessPool("twin", module, folder=folder), tmp_path)  # type: ignore[arg-type]


@pytest.mark.slow
def test_process_pool_keeps_the_contract(tmp_path: Path, mark: str) -> None:
    def open_pool(folder: Path) -> Pool:
        return ProcessPool("real", "esper.workers.checks", workers=2, folder=folder, config=PATIENT)

    check_pool(open_pool, tmp_path)


@pytest.mark.slow
def test_misdeeds_are_failures_and_the_pool_goes_on(tmp_path: Path, mark: str) -> None:
    bad: dict[str, dict[str, Any]] = {
        "segfault": {},
        "fork_bomb": {"limits": {"processes": 20}},
        "sleep": {"seconds": 1000, "limits": {"wall_s": 1.0}},
        "exit_with": {"status": 3, "say": "bad weather"},
    }
    with ProcessPool("t", JOBS, workers=2, folder=tmp_path, config=PATIENT) as pool:
        for do, fields in bad.items():
            pool.submit(do, do, jobs.payload(do, **fields))
        results = {result.key: result for result in gather(pool, len(bad))}
        pool.submit("good", "echo", jobs.payload("echo", say="still here"))
        assert gather(pool, 1)[0].result == b"still here"
        stats = pool.stats()
    assert {result.state for result in results.values()} == {JobState.FAILED}
    assert "SIGSEGV" in results["segfault"].reasons[0]
    assert "processes" in results["fork_bomb"].reasons[0]
    assert "longer than 1 s" in results["sleep"].reasons[0]
    assert "bad weather" in results["exit_with"].reasons[0]
    assert stats.deaths == 0
    assert stats.cpu_seconds_today > 0.0
    assert not (tmp_path / "workers").exists()


@pytest.mark.slow
def test_jobs_wait_when_the_day_is_spent(tmp_path: Path, mark: str) -> None:
    frugal = PoolConfig(beat_s=0.5, lease_s=30.0, patience_s=60.0, cpu_budget_s=0.2)
    with ProcessPool("t", JOBS, folder=tmp_path, config=frugal) as pool:
        pool.submit("first", "spin", jobs.payload("spin", seconds=0.3))
        assert gather(pool, 1)[0].cpu_seconds >= 0.3
        pool.submit("second", "echo", jobs.payload("echo", say="later"))
        assert pool.poll(1.0) == []
        assert pool.stats().over_budget
        assert pool.stats().jobs[JobState.WAITING] == 1
    with ProcessPool("t", JOBS, folder=tmp_path, config=PATIENT) as pool:
        assert [result.key for result in gather(pool, 1)] == ["second"]


@pytest.mark.slow
def test_a_module_that_cannot_be_imported_is_said_in_the_event(tmp_path: Path, mark: str) -> None:
    events: list[Any] = []
    with ProcessPool("t", "no.such.module", folder=tmp_path, on_event=events.append):
        until = time.monotonic() + 30.0
        while not events and time.monotonic() < until:
            time.sleep(0.05)
    assert isinstance(events[0], WorkerDied)
    assert events[0].exit_code == 2
    assert "no.such.module" in events[0].detail


def test_urgent_jobs_go_first(tmp_path: Path) -> None:
    with InProcessPool("twin", checks, folder=tmp_path, cpu_budget_s=0.0) as pool:
        for priority in (3, 1, 2):
            pool.submit(f"key{priority}", "check", b"echo", priority=priority)
    with InProcessPool("twin", checks, folder=tmp_path) as pool:
        assert [result.key for result in gather(pool, 3)] == ["key1", "key2", "key3"]


def test_a_broken_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"not a data base" * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        ProcessPool("t", JOBS, folder=tmp_path)


def test_to_listen_takes_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keys"):
        ProcessPool("t", JOBS, folder=tmp_path, listen="tcp://127.0.0.1:*")


@pytest.mark.parametrize("fields", [{"beat_s": 0.0}, {"lease_s": 1.0}, {"patience_s": 0.5}, {"max_tries": 0}])
def test_settings_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PoolConfig(**fields)


def test_an_owner_that_fails_does_not_end_the_pool(tmp_path: Path, mark: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Any) -> None:
        raise JobError("no time")

    with caplog.at_level(logging.ERROR), ProcessPool("t", "no.such.module", folder=tmp_path, on_event=fail) as pool:
        until = time.monotonic() + 30.0
        while pool.stats().deaths < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert pool.stats().deaths >= 2
    assert "could not take an event" in caplog.text


def test_where_no_other_worker_can_come_a_job_for_another_machine_fails_and_says_why(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(jobs.STRANGE, "yes")
    with InProcessPool("twin", jobs, folder=tmp_path) as pool:
        pool.submit("one", "echo", jobs.payload("echo", say="particular", particular=True))
        (result,) = gather(pool, 1)
    assert (result.state, result.tries) == (JobState.FAILED, 1)
    assert result.reasons == ("it was made for another machine",)
