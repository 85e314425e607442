import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.envelope import Priority
from esper.leyline.errors import JobError, StoreError
from esper.workers.contracts import ENDED, JobState
from esper.workers.journal import MAX_PAYLOAD, JobJournal

ROUNDS = int(os.environ.get("ESPER_SOAK", "3"))
ROOT = str(Path(__file__).parents[2])
WRITER = """
import sys
from esper.workers.journal import JobJournal
journal = JobJournal(sys.argv[1])
number = int(sys.argv[2])
while True:
    number += 1
    key = f"key{number}"
    journal.submit(key, "test", key.encode())
    print("S", key, flush=True)
    job = journal.lease("w", 100.0)
    journal.done(job.id, job.payload * 2)
    print("D", job.key, flush=True)
"""

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "lease", "done", "fail", "final", "requeue", "revive", "take"]), st.integers(0, 4)
    ),
    max_size=40,
)


@given(ACTIONS)
def test_no_job_is_lost_and_none_ends_twice(actions: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = JobJournal(f"{folder}/jobs.sqlite")
        ids: dict[str, str] = {}
        ended: dict[str, bytes] = {}
        for number, (do, which) in enumerate(actions):
            key, worker = f"key{which}", f"worker{which % 2}"
            if do == "submit":
                assert journal.submit(key, "test", b"payload") == ids.setdefault(key, ids.get(key) or _id(journal, key))
            elif do == "lease":
                journal.lease(worker, 10.0)
            elif do == "requeue":
                journal.requeue(worker)
            elif key in ids:
                _answer(journal, do, ids[key], worker, number, ended)
            for job_id, result in ended.items():
                found = journal.result(job_id)
                assert found is not None and found.result == result
        assert sum(journal.counts().values()) == len(ids)
        journal.close()


def _id(journal: JobJournal, key: str) -> str:
    return journal.submit(key, "test", b"payload")


def _answer(journal: JobJournal, do: str, job: str, worker: str, number: int, ended: dict[str, bytes]) -> None:
    before = journal.result(job)
    if do == "done":
        changed = journal.done(job, b"%d" % number)
        assert changed == (before is None)
        if changed:
            ended[job] = b"%d" % number
    elif do in ("fail", "final"):
        state = journal.failed(job, "why", final=do == "final", worker=worker)
        assert before is None or state is None
        assert do != "final" or state in (None, JobState.FAILED)
    elif do == "revive":
        assert journal.revive(job) == (before is not None and not before.ok)
    else:
        journal.take([job])
        assert job not in [result.job_id for result in journal.untaken()]


def test_urgency_then_age(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "jobs.sqlite")
    for key, priority in (("old", 2), ("new", 2), ("urgent", 0)):
        journal.submit(key, "test", b"", priority)
    leased = [journal.lease("w", 1.0) for _ in range(4)]
    assert [job and job.key for job in leased] == ["urgent", "old", "new", None]
    journal.close()


def test_what_is_held_back_waits_and_loses_nothing(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "jobs.sqlite")
    for priority in (Priority.LOW, Priority.NORMAL):
        journal.submit(priority.name, "test", b"", priority)
    journal.hold(Priority.NORMAL)
    leased = [journal.lease("w", 1.0) for _ in range(2)]
    assert [job and job.key for job in leased] == ["NORMAL", None]
    journal.hold(Priority.LOW)
    job = journal.lease("w", 1.0)
    assert job is not None and job.key == "LOW"
    journal.close()


def test_three_failed_tries_are_quarantine_with_every_reason(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "jobs.sqlite")
    job_id = journal.submit("poison", "test", b"")
    for number in range(3):
        job = journal.lease("w", 1.0)
        assert job is not None and job.attempt == number + 1
        state = journal.failed(job_id, f"reason {number}", final=False, worker="w")
    assert state is JobState.QUARANTINED
    assert journal.lease("w", 1.0) is None
    (result,) = journal.untaken()
    assert result.reasons == ("reason 0", "reason 1", "reason 2")
    assert journal.revive(job_id) and journal.lease("w", 1.0) is not None
    journal.close()


def test_a_late_failure_changes_nothing_and_a_late_result_counts(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "jobs.sqlite")
    job_id = journal.submit("key", "test", b"")
    journal.lease("slow", 0.0)
    assert journal.expired() == [(job_id, "slow")]
    journal.failed(job_id, "lease ran out", final=False, worker="slow")
    journal.lease("quick", 10.0)
    assert journal.failed(job_id, "late", final=True, worker="slow") is None
    assert not journal.renew(job_id, "slow", 1.0)
    assert journal.renew(job_id, "quick", 1.0)
    assert journal.done(job_id, b"late but right", worker="slow")
    assert not journal.done(job_id, b"second", worker="quick")
    assert [result.result for result in journal.untaken()] == [b"late but right"]
    journal.close()


def test_two_processes_and_four_threads_never_share_a_job(tmp_path: Path) -> None:
    journals = [JobJournal(tmp_path / "jobs.sqlite") for _ in range(2)]
    for number in range(40):
        journals[0].submit(f"key{number}", "test", b"")
    got: list[str] = []

    def work(journal: JobJournal, name: str) -> None:
        while job := journal.lease(name, 100.0):
            got.append(job.id)

    threads = [threading.Thread(target=work, args=(journals[n % 2], f"w{n}")) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == len(set(got)) == 40
    for journal in journals:
        journal.close()


def test_accounts(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "jobs.sqlite")
    assert journal.spent_today() == 0.0
    journal.spend(1.5)
    journal.spend(2.0)
    assert journal.spent_today() == 3.5
    job_id = journal.submit("key", "test", b"")
    journal.done(job_id, b"x")
    assert journal.prune(0.0) == 0, "a result that nobody took was forgotten"
    journal.take([job_id])
    assert journal.prune(100.0) == 0
    assert journal.prune(0.0) == 1
    with pytest.raises(JobError, match="no job"):
        journal.result(job_id)
    journal.close()


def test_what_is_too_long_is_refused(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "jobs.sqlite")
    with pytest.raises(JobError, match="bytes"):
        journal.submit("key", "test", bytes(MAX_PAYLOAD + 1))
    journal.close()


@pytest.mark.slow
def test_killed_at_any_moment_the_journal_keeps_its_word(tmp_path: Path) -> None:
    path, number = tmp_path / "jobs.sqlite", 0
    for turn in range(ROUNDS):
        command = [sys.executable, "-c", WRITER, str(path), str(number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ROOT}) as writer:
            assert writer.stdout is not None
            said = [writer.stdout.readline().decode().split()]
            time.sleep(0.03 * (turn % 7))
            writer.send_signal(signal.SIGKILL)
            said += [line.decode().split() for line in writer.stdout.read().splitlines()]
        journal = JobJournal(path)
        assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
        journal.requeue()
        results = {result.key: result.result for result in journal.untaken()}
        for words in filter(lambda words: len(words) == 2, said):
            number = max(number, int(words[1].removeprefix("key")))
            assert words[0] == "S" or results[words[1]] == words[1].encode() * 2
        assert sum(journal.counts().values()) in (number, number + 1)
        number = sum(journal.counts().values())
        while job := journal.lease("w", 1.0):
            journal.done(job.id, job.payload * 2)
        journal.close()


def test_a_full_disk_is_an_error_and_leaves_the_journal_whole(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "jobs.sqlite")
    journal.submit("first", "test", b"small")
    journal._base.execute("PRAGMA max_page_count = 20")
    with pytest.raises(StoreError, match="full"):
        journal.submit("second", "test", bytes(2**20))
    assert journal.counts()[JobState.WAITING] == 1
    assert {state for state, count in journal.counts().items() if count} == {JobState.WAITING}
    assert not ENDED & {JobState.WAITING, JobState.LEASED}
    journal.close()


def test_a_worker_is_not_given_what_it_cannot_do(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "jobs.sqlite")
    first, second = journal.submit("a", "test", b"1"), journal.submit("b", "test", b"2")
    job = journal.lease("here", 10.0)
    assert job is not None and job.id == first
    assert journal.requeue("here") == 1
    other = journal.lease("here", 10.0, {first})
    assert other is not None and other.id == second
    assert journal.lease("there", 10.0, [first, second]) is None
    again = journal.lease("there", 10.0, [second])
    assert again is not None and (again.id, again.attempt) == (first, 1)
    journal.close()
