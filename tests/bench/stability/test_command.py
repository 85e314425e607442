"""`esper bench stability` as a user types it."""

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from esper.bench.rows import Job, Row, Rows
from esper.bench.stability import run as running
from esper.bench.stability.command import command
from esper.bench.stability.parts import Plan, jobs
from esper.cli import main


def failure(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "stability", *args])
    assert stop.value.code == 2
    return capsys.readouterr().err


def row_of(job: Job) -> Row:
    """A row as its process leaves it, without the process."""
    made: dict[str, Any] = {"versions": "these", "process_seconds": 2.0, "format": 1, "host_params": 1000}
    if job.config["part"] == "grafts":
        drift = 0.06 if job.config["child"] == "plain" else 0.01
        entry = {"original_loss": 2.0, "trained_loss": 3.0, "downstream": 0.0, "upstream": 0.0}
        after = {"original_loss": 2.04, "trained_loss": 2.5, "downstream": drift, "upstream": 0.0}
        return made | {"history": [entry, after]}
    if job.config["part"] == "defects":
        return made | {"defective": 0.5, "sound": 0.1, "loss": 0.2, "kept": []}
    sizes = [5000] if job.config["arm"] == "full" else [100, 1000]
    return made | {"points": [{"params": size, "gain": size / 5000} for size in sizes]}


def test_a_typo_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "did you mean 'grafts'?" in failure(capsys, "--parts", "graft", "--out", str(tmp_path))
    assert "0 is not above 0" in failure(capsys, "--grafts", "0")
    with FileLock(tmp_path / ".lock"):
        assert "another bench writes to" in failure(capsys, "--out", str(tmp_path))


@pytest.mark.slow
def test_rows_that_are_there_are_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(running, "WORKER", ("false",))
    wanted, rows = jobs(Plan(("grafts", "defects", "efficiency"), seeds=2, grafts=1)), Rows(tmp_path / "rows")
    assert len({job.key for job in wanted}) == len(wanted) == 2 * (10 + 4 + 4)
    for job in wanted:
        rows.keep(job, row_of(job))
    args = ["--seeds", "2", "--grafts", "1", "--out", str(tmp_path)]
    assert command(args) == 0
    told = capsys.readouterr().out
    assert "36 are there" in told and max(map(len, told.splitlines()[:40])) <= 80
    text = (tmp_path / "stability.md").read_text()
    assert "Not held: new frozen plain, new live plain, same frozen plain, same live plain." in text
    assert "Resolved 0 of 8 planted defects" in text and "| new | frozen | gated | +2.0 | +2.0 |" in text
    assert "--grafts 1" in text and (tmp_path / "stability.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "stability.json").read_text())["rows"]) == 36
    # Another number of grafts is another row, and its process fails here.
    assert command([*args, "--seeds", "1", "--grafts", "2", "--parts", "grafts"]) == 1
    assert "failed" in capsys.readouterr().out
