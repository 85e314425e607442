"""The journal of a resumed run goes on at the checkpoint's place, without duplicates and without touching others."""

from pathlib import Path
from typing import Any

import pytest

from esper.leyline.events import EpochEvent
from esper.tamiyo.journal import EVENTS, REPORTS, Journal


def event(run: str, step: int) -> EpochEvent:
    return EpochEvent(run_id=run, epoch=0, step=step)


def lines(folder: Path) -> list[str]:
    return (folder / EVENTS).read_text().splitlines()


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Any]:
    """Two events, a checkpoint, two more events, and half a line as a kill leaves it."""
    journal = Journal(tmp_path)
    journal.write(event("run", 1))
    journal.write(event("run", 2))
    cursor = journal.cursor("run")
    journal.write(event("run", 3))
    journal.write(event("run", 4))
    journal.close()
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"run_id": "ru')
    return cursor


def test_what_came_after_the_checkpoint_is_dropped(tmp_path: Path, written: dict[str, Any]) -> None:
    kept = lines(tmp_path)[:2]
    Journal(tmp_path, written).close()
    assert lines(tmp_path) == kept
    Journal(tmp_path, written).close()
    assert lines(tmp_path) == kept


def test_another_runs_events_stay(tmp_path: Path, written: dict[str, Any]) -> None:
    with (tmp_path / EVENTS).open("a") as file:
        file.write("\n")
    other = Journal(tmp_path)
    other.write(event("other", 1))
    other.close()
    found = lines(tmp_path)
    Journal(tmp_path, written).close()
    assert lines(tmp_path) == [*found[:2], found[-1]]


def test_a_journal_of_another_folder_is_left_as_it_is(tmp_path: Path, written: dict[str, Any]) -> None:
    folder = tmp_path / "new"
    Journal(folder, written).close()
    assert lines(folder) == []
    journal = Journal(folder)
    for step in range(9):
        journal.write(event("run", step + 100))
    journal.close()
    Journal(folder, written).close()
    assert len(lines(folder)) == 9


def test_a_cursor_is_plain_and_outlives_the_journal(tmp_path: Path, written: dict[str, Any]) -> None:
    journal = Journal(tmp_path, written)
    journal.close()
    assert journal.cursor("run") == written
    assert set(written) == {"run_id", EVENTS, REPORTS} and written[REPORTS] == [0, 0]
