"""A bench: what is there is not made again, what fails stops nothing else, and equal compute is equal."""

import json
from io import StringIO
from pathlib import Path

from rich.console import Console

from esper.bench.arms import ARMS, GROWN, OFF, WIDE
from esper.bench.growth import Bench, Run, chosen, leave
from esper.bench.pool import Pool
from esper.bench.results import Results
from esper.bench.rows import Rows
from tests.bench.samples import made, stub, tiny


def run(folder: Path, *arms: str, seeds: int = 1, **acts: str) -> tuple[Results, str]:
    bench = Bench(tiny(), chosen(arms), tuple(range(seeds)), folder)
    out = StringIO()
    console = Console(file=out, width=100)
    rows = Pool(Rows(folder / "rows"), folder / "runs", worker=stub(folder, **acts))
    return Run(bench, console, rows)(), out.getvalue()


def test_a_row_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    first, _ = run(tmp_path, OFF, "lora", seeds=2)
    assert len(made(tmp_path)) == 6
    again, told = run(tmp_path, OFF, "lora", seeds=2)
    assert len(made(tmp_path)) == 6 and again.rows == first.rows and "6 of 6 rows are there" in told
    run(tmp_path, OFF, "lora", "random", seeds=3)
    assert made(tmp_path)[6:] == ["heuristic-2", "random-0", "random-1", "off-2", "random-2", "lora-2"] or (
        sorted(made(tmp_path)[6:]) == ["heuristic-2", "lora-2", "off-2", "random-0", "random-1", "random-2"]
    )


def test_arms_at_equal_compute_get_the_work_of_the_live_trial(tmp_path: Path) -> None:
    run(tmp_path, *ARMS)
    work = {f.parent.name: json.loads(f.read_text())["work"] for f in tmp_path.glob("runs/*/job.json")}
    assert {name.removesuffix("-0") for name, macs in work.items() if macs is not None} == {OFF, WIDE, "lora"}
    assert {macs for macs in work.values() if macs is not None} == {1000.0}


def test_what_is_the_same_run_is_made_once(tmp_path: Path) -> None:
    results, _ = run(tmp_path, OFF, "from_start")
    assert made(tmp_path) == ["heuristic-0", "off-0"] and results.as_off("from_start") == [0]
    assert results.rows["from_start", 0]["arm"] == "from_start"


def test_what_fails_stops_nothing_else_and_is_tried_again(tmp_path: Path) -> None:
    results, told = run(tmp_path, OFF, "lora", seeds=2, **{"heuristic-0": "fail", "lora-1": "fail"})
    assert set(results.rows) == {(GROWN, 1), (OFF, 1)}
    assert results.failed["lora", 1] == "no room for it" and results.failed[OFF, 0] == "no heuristic run of this seed"
    assert "lora seed 1 failed: no room for it" in told
    again, _ = run(tmp_path, OFF, "lora", seeds=2)
    assert len(again.rows) == 6 and not again.failed and made(tmp_path).count("off-1") == 1


def test_what_is_left_can_be_read(tmp_path: Path) -> None:
    results, _ = run(tmp_path, *ARMS, seeds=2)
    leave(results, tmp_path, "esper bench growth")
    left = json.loads((tmp_path / "growth.json").read_text())
    assert set(left["arms"]) == set(ARMS) and len(left["rows"]) == 2 * len(ARMS)
    text = (tmp_path / "growth.md").read_text()
    assert all(f"| {arm} |" in text for arm in ARMS) and "![Gain in report loss on" in text
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
