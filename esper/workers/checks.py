"""The checker of pools, and the module of jobs that it has them do.

A payload is a word and a text, `b"echo hello"`: `echo` gives the text back, `refuse` fails for good, `stumble` fails
in a way that is tried again.
"""

import time
from collections.abc import Callable
from pathlib import Path

from esper.leyline.errors import JobError
from esper.workers.contracts import JobResult, JobState, Pool
from esper.workers.limits import Limits, SandboxOutcome

_PATIENCE_S = 60.0
_SHORT_S = 0.3


def prepare(payload: bytes, folder: Path) -> list[str]:
    """Write the payload down; the command copies it."""
    (folder / "input").write_bytes(payload)
    return ["cp", "input", "output"]


def work(folder: Path) -> None:
    """Do what the command does."""
    (folder / "output").write_bytes((folder / "input").read_bytes())


def collect(folder: Path, outcome: SandboxOutcome) -> bytes:
    """Return the text, or fail as the word says."""
    if not outcome.ok:
        raise JobError(f"The copy failed: {outcome.detail}.")
    word, _, text = (folder / "output").read_bytes().partition(b" ")
    if word == b"refuse":
        raise JobError("It was told to refuse.")
    if word == b"stumble":
        raise RuntimeError("it was told to stumble")
    return text


def limits(payload: bytes) -> Limits:
    """Return little: a copy needs no more."""
    return Limits(cpu_s=5.0, wall_s=60.0, memory_mb=256, files_mb=65, background=False)


def check_pool(factory: Callable[[Path], Pool], folder: Path) -> None:
    """Check that a pool keeps its contract.

    Args:
        factory: opens a pool over the job module `esper.workers.checks` with its files in the folder given; it is
            called several times with the same folder, after the pool before was closed. `max_tries` is 3.
        folder: an empty folder.

    Raises:
        AssertionError: the message names what was broken.
    """
    with factory(folder) as pool:
        _check_empty(pool)
        _check_once(pool)
        _check_failures(pool)
        last = pool.submit("last", "check", b"echo last")
        assert [result.job_id for result in _gather(pool, 1)] == [last], "a result was not handed out"
    with factory(folder) as pool:
        again = _gather(pool, 1)
        assert [result.result for result in again] == [b"last"], "a result that was never taken got lost at the close"
        assert pool.poll(_SHORT_S) == [], "a result was handed out twice"
        assert pool.stats().jobs[JobState.DONE] == 5, f"{pool.stats().jobs} counts something else than was done"
    _check_closed(pool)


def _check_empty(pool: Pool) -> None:
    started = time.monotonic()
    assert pool.poll(_SHORT_S) == [], "an empty pool handed something out"
    assert time.monotonic() - started >= _SHORT_S * 0.9, "poll did not wait for a result"


def _check_once(pool: Pool) -> None:
    ids = [pool.submit(f"key{number}", "check", b"echo %d" % number) for number in range(3)]
    assert pool.submit("key0", "check", b"echo 0") == ids[0], "the same key got another job"
    assert len(set(ids)) == 3, "two keys share a job"
    results = {result.job_id: result for result in _gather(pool, 3)}
    assert set(results) == set(ids), "a job got lost"
    assert [results[job].result for job in ids] == [b"0", b"1", b"2"], "a result belongs to another job"
    assert pool.poll(_SHORT_S) == [], "a result was handed out twice"
    assert pool.submit("key1", "check", b"echo 1") == ids[1], "a key that is done got another job"
    assert [result.result for result in _gather(pool, 1)] == [b"1"], "a result was not given again to who asked again"
    pool.submit("large", "check", b"echo " + bytes(2**20))
    assert _gather(pool, 1)[0].result == bytes(2**20), "a long result was damaged"


def _check_failures(pool: Pool) -> None:
    pool.submit("refused", "check", b"refuse me")
    (refused,) = _gather(pool, 1)
    assert refused.state is JobState.FAILED and refused.tries == 1, f"a refusal ended as {refused.state}"
    assert "told to refuse" in refused.reasons[0], f"the reason got lost: {refused.reasons}"
    pool.submit("stumbled", "check", b"stumble")
    (stumbled,) = _gather(pool, 1)
    assert stumbled.state is JobState.QUARANTINED, f"a job that never succeeds ended as {stumbled.state}"
    assert len(stumbled.reasons) == stumbled.tries == 3, f"not three tries with their reasons: {stumbled.reasons}"


def _check_closed(pool: Pool) -> None:
    pool.close()
    try:
        pool.submit("late", "check", b"echo late")
    except JobError:
        return
    raise AssertionError("a closed pool took a job")


def _gather(pool: Pool, count: int) -> list[JobResult]:
    """Poll until so many results have come."""
    results: list[JobResult] = []
    until = time.monotonic() + _PATIENCE_S
    while len(results) < count:
        left = until - time.monotonic()
        assert left > 0, f"{len(results)} of {count} results came in {_PATIENCE_S:g} s"
        results += pool.poll(left)
    return results
