"""A row is found again by what it depends on."""

from pathlib import Path

import pytest

from esper.bench.arms import ARMS, OFF
from esper.bench.experiment import prepared
from esper.bench.rows import Job, Rows, write
from esper.config import moved
from esper.leyline.errors import OutputError
from tests.bench.samples import digits, plain_row, plan


def job(**given: object) -> Job:
    return Job("off", 0, {**ARMS[OFF].make(plan()), **given})


def test_the_key_covers_the_run_and_not_its_folder() -> None:
    elsewhere = ARMS[OFF].make(plan()._replace(config=prepared(moved(digits(), "outputs/digits", "/else/where"))))
    assert Job("off", 0, elsewhere).key == job().key
    assert len({job().key, job(seed_everything=1).key, Job("off", 0, job().config, 9.0).key}) == 3


def test_a_row_is_found_again_under_the_arm_that_asks(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    assert rows.find(job()) is None
    kept = rows.keep(job(), plain_row(loss=float("nan")))
    assert kept["report_loss"] is None and kept["key"] == job().key
    same = Job("from_start", 0, job().config)
    assert rows.find(same) == {**kept, "arm": "from_start"}


def test_a_damaged_row_is_told_and_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / f"{job().key}.json").write_text("{")
    with pytest.raises(OutputError, match="remove it"):
        Rows(tmp_path).find(job())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose a writable folder"):
        write(tmp_path / "file" / "row.json", {})
