"""Blocks are fair: every call as often as any other, there and back, and each first in its turn."""

import pytest

from esper.bench.speed import timing


def test_a_block_runs_there_and_back_and_begins_with_another_call_each_time() -> None:
    ran: list[str] = []
    calls = {name: lambda name=name: ran.append(name) for name in "abc"}
    prepared: list[str] = []
    found = timing.blocks(calls, 3, repeats=2, prepare=prepared.append)
    assert "".join(ran) == "abccba" * 2 + "bcaacb" * 2 + "cabbac" * 2 and prepared == ran
    assert len(found) == 3 and all(times.keys() == set("abc") for times in found)


def test_a_block_keeps_the_least_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([5.0, 9.0, 3.0, 7.0])
    monkeypatch.setattr(timing, "seconds", lambda call: next(taken))
    assert timing.blocks({"a": int, "b": int}, 1) == [{"a": 5.0, "b": 3.0}]


def test_the_first_call_does_not_count() -> None:
    ran: list[int] = []
    assert len(timing.timed(lambda: ran.append(1), 4)) == 4 and len(ran) == 5
