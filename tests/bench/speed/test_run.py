"""A whole table: one row that fails is told and the others go on; what is written agrees with what is shown."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from esper.bench.speed import rows, run
from esper.bench.speed.line import Line, not_measured
from esper.bench.speed.rows import ROWS, Effort, Row
from esper.bench.speed.table import Results, summary, terminal

LINES = [
    Line(what="cached hit", value=0.541, unit="µs", target=10.0, limit=0.13, of="a dict lookup", numbers={"n": 3}),
    Line(what="decision", value=1476.2, unit="ms", target=100.0, limit=0.1, of="a sort"),
    Line(what="attach", value=38.2, unit="ms", limit=78.0, of="PEFT"),
    not_measured("compile", "s", 20.0, "give --compile"),
]


def broken(effort: Effort) -> list[Line]:
    raise ValueError("no room")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Results, str]:
    kinds = {"first": Row("one", broken), "second": Row("two", lambda effort: LINES), "third": Row("3", broken)}
    monkeypatch.setattr(run, "ROWS", kinds)
    out = StringIO()
    results = run.measure(["second", "first"], Effort(tmp_path, quick=True), "esper bench speed", Console(file=out))
    return results, out.getvalue()


def test_a_row_that_fails_is_told_and_the_others_go_on(table: tuple[Results, str]) -> None:
    results, told = table
    assert results.failed == {"first": "ValueError: no room"} and results.lines == {"second": LINES}
    assert "failed: ValueError: no room" in told and told.index("first: one") < told.index("second: two")
    assert summary(results) == "1 of 2 targets are met on this machine; 1 not measured; 1 failed"


def test_what_is_written_agrees(table: tuple[Results, str], tmp_path: Path) -> None:
    results, _ = table
    run.leave(results, tmp_path / "out")
    text = (tmp_path / "out" / run.TEXT).read_text()
    found = json.loads((tmp_path / "out" / run.NUMBERS).read_text())
    lines = {line["what"]: line for line in found["rows"]["second"]["lines"]}
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("| second")]
    assert [row[1] for row in cells] == list(lines) and len(cells) == 4
    for _, what, measured, _, verdict, _ in cells:
        assert verdict == {"no target": ""}.get(lines[what]["verdict"], lines[what]["verdict"])
        value = lines[what]["value"]
        assert (
            (measured == "")
            if value is None
            else float(measured.split()[0].replace(",", "")) == pytest.approx(value, rel=0.01)
        )
    assert "| not measured | give --compile |" in text and "(few repeats)" in text and found["quick"] is True
    assert "| first |  |  |  | failed | ValueError: no room |" in text
    assert found["rows"]["first"]["error"] == "ValueError: no room" and lines["cached hit"]["numbers"] == {"n": 3}
    assert found["machine"]["cores"] >= 1 and len(found["load_average_after"]) == 3 and "Load average before" in text


def test_the_table_fits_80_columns(table: tuple[Results, str]) -> None:
    results, _ = table
    out = StringIO()
    Console(file=out, width=80).print(terminal(results))
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= 80 and "--quick" in shown
    assert (
        "met, ≤ 10 µs" in shown and "missed, ≤ 100 ms" in shown and "0.13 µs: a dict lookup" in " ".join(shown.split())
    )


def test_few_repeats_are_fewer(tmp_path: Path) -> None:
    assert Effort(tmp_path, quick=True).times(9, 3) == 3 and Effort(tmp_path).times(9, 3) == 9


def test_what_is_not_asked_for_is_not_measured_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ROWS["compile"].measure(Effort(tmp_path))
    assert len(lines) == 4 and all("--compile" in line.why and line.target for line in lines)
    monkeypatch.setattr(rows.stalls, "why_not", lambda: "there is one core only")
    lines = [*ROWS["stalls"].measure(Effort(tmp_path)), *ROWS["cache"].measure(Effort(tmp_path))]
    assert [line.target for line in lines] == [1.05, 2.0, 99.5]
    assert all(line.value is None and line.why == "there is one core only" for line in lines)
