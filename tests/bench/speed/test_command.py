"""`esper bench speed` as a user types it."""

import json
from pathlib import Path

import pytest
from filelock import FileLock

from esper.bench.speed import rows
from esper.bench.speed.command import command
from esper.cli import main


def failure(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "speed", *args])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_a_user_mistypes_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'kernel'?" in failure(capsys, "--rows", "kernle")
    told = failure(capsys, "--rows", "xyz")
    assert all(name in told for name in rows.ROWS)
    assert "0 is not above 0" in failure(capsys, "--steps", "0")


def test_two_benches_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(tmp_path / ".lock"):
        assert "another bench writes to" in failure(capsys, "--rows", "kernel", "--out", str(tmp_path))


def test_some_rows_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--rows", "compile,kernel", "--quick", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.index("kernel: a lookup") < told.index("compile: compiling") and "cached hit" in told
    found = json.loads((tmp_path / "speed.json").read_text())
    assert list(found["rows"]) == ["kernel", "compile"] and found["rows"]["kernel"]["seconds"] > 0
    assert f"--out {tmp_path}" in found["command"] and "cached hit" in (tmp_path / "speed.md").read_text()


def test_a_failure_shows_in_the_status_and_ctrl_c_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows.kernels, "hit_line", lambda lookups: 1 / 0)
    assert command(["--rows", "kernel", "--out", str(tmp_path / "a")]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rows.compiling, "left_out", interrupted)
    with pytest.raises(SystemExit) as stop:
        command(["--rows", "kernel", "compile", "--out", str(tmp_path / "b")])
    assert stop.value.code == 130 and "the rows that were done" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "b" / "speed.json").read_text())["rows"]) == ["kernel"]
