"""What is told of a run beside the forge: from made-up numbers, and once of a real one."""

import os
from pathlib import Path

import psutil
import pytest

from esper.bench.speed.line import Verdict
from esper.bench.speed.stalls import KINDS, Run, Window, by_kind, hit_line, stall_lines, train, why_not


def run(slow: float = 1.0, pools_s: float = 180.0, grafts: tuple[int, ...] = (100, 300), at: float = 1.0) -> Run:
    """A step every tenth of a second for 10 minutes; windows of 2 s, steps beside busy pools being slower."""
    windows = [Window(KINDS[n % 3], 2.0 * n, 2.0 * n + 1.9) for n in range(300)]
    began = [0.1 * n + 0.001 for n in range(6000)]
    times = [0.01 * (slow if KINDS[int(b // 2) % 3] == "busy" else 1.0) for b in began]
    for step in grafts:
        times[step] *= at
    lookups = [(max(0, sum(2 for g in grafts if g <= n) - 2), sum(2 for g in grafts if g <= n)) for n in range(6000)]
    return Run(began, times, lookups, list(grafts), grafts[1], windows, pools_s)


def test_steps_belong_to_the_window_in_which_they_lie() -> None:
    counts = {kind: len(times) for kind, times in by_kind(run()).items()}
    # 19 of the 20 steps end inside; the first 50 steps of the run do not count.
    assert counts == {"busy": 1900 - 19, "idle": 1900 - 19, "program": 1900 - 10}


@pytest.mark.parametrize(("slow", "verdict"), [(1.0, Verdict.MET), (1.04, Verdict.MET), (1.2, Verdict.MISSED)])
def test_slower_steps_beside_busy_pools_are_seen(slow: float, verdict: Verdict) -> None:
    line = stall_lines(run(slow))[0]
    assert line.value == pytest.approx(slow) and line.verdict is verdict and line.limit == pytest.approx(1.0)


def test_pools_that_did_not_get_their_core_measure_nothing() -> None:
    line = stall_lines(run(pools_s=4.0))[0]
    assert line.value is None and "the pools got 2 % of their core only" in line.why


def test_too_few_steps_measure_nothing() -> None:
    few = run()
    line = stall_lines(few._replace(windows=few.windows[:3], pools_s=2.0))[0]
    assert line.value is None and "more --steps" in line.why


@pytest.mark.parametrize(("at", "verdict"), [(1.9, Verdict.MET), (2.1, Verdict.MISSED)])
def test_a_long_step_at_a_graft_is_seen(at: float, verdict: Verdict) -> None:
    line = stall_lines(run(at=at))[1]
    assert line.value == pytest.approx(at) and line.verdict is verdict and line.limit == pytest.approx(1.0)


def test_lookups_count_once_each_kind_was_there() -> None:
    line = hit_line(run(grafts=(100, 300, 500, 700)))
    assert line.value == 100.0 and line.numbers == {"found": 4, "lookups": 4, "all": [6, 8]}
    assert hit_line(run()).value is None


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason="needs two cores")
def test_a_run_beside_a_forge(tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    found = train(tmp_path, 160)
    assert len(found.times) == len(found.began) == len(found.lookups) == 160 and min(found.times) > 0
    assert {window.kind for window in found.windows} == set(KINDS)
    assert found.moments == [25, 100] and found.known == 100 and found.lookups[-1][1] == 4
    assert any(by_kind(found).values()) and stall_lines(found)[1].value
    assert os.sched_getaffinity(0) == cores and not _of(tmp_path)


def _of(folder: Path) -> list[psutil.Process]:
    """Processes that work for a folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())]
