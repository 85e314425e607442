"""Processes that make rows: each its own, all of them gone in the end."""

import os
from pathlib import Path

import pytest

from esper.bench.pool import Failed, Pool
from esper.bench.rows import Job, Rows
from tests.bench.samples import made, plan, stub, until


def pool(folder: Path, jobs: int = 1, **acts: str) -> Pool:
    return Pool(Rows(folder / "rows"), folder / "runs", jobs=jobs, worker=stub(folder, **acts))


def job(arm: str, seed: int = 0) -> Job:
    return Job(arm, seed, {**plan().config, "title": arm, "seed_everything": seed})


def test_rows_are_made_and_kept_and_make_others_possible(tmp_path: Path) -> None:
    rows = pool(tmp_path)
    found = list(rows.run([job("heuristic")], lambda done, row: [job("off")] if done.arm == "heuristic" else []))
    assert [done.arm for done, _ in found] == ["heuristic", "off"]
    for done, row in found:
        assert isinstance(row, dict) and row == rows.rows.find(done) and row["process_seconds"] > 0


def test_one_that_fails_is_told_in_its_own_words_and_the_others_are_made(tmp_path: Path) -> None:
    acts = {"fails-0": "fail", "killed-0": "kill"}
    found = {done.arm: r for done, r in pool(tmp_path, **acts).run([job(a) for a in ("fails", "killed", "fine")], no)}
    assert isinstance(found["fails"], Failed) and found["fails"].why == "no room for it"
    assert "said before" in found["fails"].log.read_text()
    assert isinstance(found["killed"], Failed) and "SIGKILL; was there enough memory?" in found["killed"].why
    assert isinstance(found["fine"], dict)


def test_when_the_bench_stops_no_process_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.bench.pool._KILL_AFTER_S", 0.2)
    waiting = tmp_path / "runs" / "waits-0" / "pid"
    running = pool(tmp_path, jobs=2, **{"waits-0": "wait"}).run([job("waits"), job("fine"), job("later")], no)
    next(running)
    until(lambda: waiting.exists() and bool(waiting.read_text()))
    running.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(waiting.read_text()), 0)
    assert len(made(tmp_path)) < 4 and not (tmp_path / "runs" / "waits-0" / "row.json").exists()


def no(done: Job, row: object) -> list[Job]:
    return []
