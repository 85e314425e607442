"""Every model of the compatibility table, and the table itself."""

from pathlib import Path

import pytest

from tests.compat import table

COMMITTED = table.committed()
"""The rows that the file shows; the models themselves are imported by the tests, for their libraries take seconds."""

STALE = "docs/compatibility.md is stale: run `python -m tests.compat.table` and commit what it writes"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMITTED if not name.startswith("timm")])
def test_the_model_does_what_the_table_says(name: str, tmp_path: Path) -> None:
    case = next((case for case in table.cases() if case.name == name), None)
    assert case is not None, STALE
    assert table.row(case, tmp_path) == COMMITTED[name], STALE


@pytest.mark.slow
def test_the_timm_models_do_what_the_table_says() -> None:
    assert table.vision_rows() == [row for name, row in COMMITTED.items() if name.startswith("timm")], STALE


@pytest.mark.slow
def test_no_model_is_missing_from_the_table() -> None:
    names = [case.name for case in table.cases()]
    assert len(names) == len(set(names))
    assert [name for name in COMMITTED if not name.startswith("timm")] == names, STALE


def test_the_document_is_what_is_written_from_its_rows() -> None:
    assert table.render(COMMITTED.values()) == table.DOCUMENT.read_text(encoding="utf-8"), STALE


def test_a_missing_folder_is_said_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "VISION", tmp_path)
    with pytest.raises(RuntimeError, match="run `make setup`"):
        table.vision_rows()
