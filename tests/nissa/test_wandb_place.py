from pathlib import Path

import pytest

from esper.nissa.wandb.place import WANDB_FILE, Place


def test_a_place_is_read_as_it_was_written(tmp_path: Path) -> None:
    place = Place("ada", "esper", "abc", "https://wandb.example.org/abc", False, "wandb/run-abc", "digest")
    place.write(tmp_path)
    assert Place.read(tmp_path) == place


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"id": "abc"}', '{"entity": "", "project": "", "id": "", "x": 1}']
)
def test_no_place_where_none_can_be_read(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / WANDB_FILE).write_text(content)
    assert Place.read(tmp_path) is None
