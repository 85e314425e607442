import json
import math
from pathlib import Path

import pytest

from esper.leyline.base import Message
from esper.leyline.errors import OutputError
from esper.nissa.chronicle import Chronicle
from esper.nissa.folder import growth_summary, read_chronicle, require_writable, write_json
from esper.tamiyo.journal import Journal
from tests.nissa.stories import boundary, story


def journal(folder: Path, messages: list[Message]) -> None:
    log = Journal(folder)
    for message in messages:
        log.write(message)
    log.close()


def test_a_run_is_read_back_as_it_was_told(tmp_path: Path) -> None:
    chronicle = story(lives=4)
    journal(tmp_path, chronicle.messages)
    write_json(tmp_path / "growth.json", growth_summary(chronicle, "t"))
    found = read_chronicle(tmp_path)
    assert growth_summary(found, "t") == growth_summary(chronicle, "t")
    assert found.lives() == chronicle.lives()


def test_without_the_summary_the_events_are_enough_for_the_lives(tmp_path: Path) -> None:
    chronicle = story(lives=2)
    journal(tmp_path, chronicle.messages)
    found = read_chronicle(tmp_path, "r")
    assert found.lives() == chronicle.lives() and found.train_losses[0] == (10, 3.0)


def test_only_the_past_of_a_resumed_run_is_read(tmp_path: Path) -> None:
    chronicle = story(lives=2)
    journal(tmp_path, chronicle.messages)
    write_json(tmp_path / "growth.json", growth_summary(chronicle))
    found = read_chronicle(tmp_path, "r", until=45)
    assert found.steps == 45 and [life.outcome is None for life in found.lives()] == [True, False]
    assert [life.report is None for life in found.lives()] == [True, False]


def test_a_replayed_part_counts_once(tmp_path: Path) -> None:
    chronicle = story(lives=2)
    journal(tmp_path, chronicle.messages)
    journal(tmp_path, [m for m in chronicle.messages if getattr(m, "step", 99) >= 20])
    found = read_chronicle(tmp_path)
    assert found.lives() == chronicle.lives() and found.decision_losses == chronicle.decision_losses


def test_other_runs_are_left_out(tmp_path: Path) -> None:
    other = boundary(10).model_copy(update={"run_id": "other"})
    journal(tmp_path, [*story().messages, other])
    assert read_chronicle(tmp_path).run_id == "other"
    assert read_chronicle(tmp_path, "fresh") == Chronicle(run_id="fresh")


def test_decision_losses_that_only_the_report_measured(tmp_path: Path) -> None:
    told = Chronicle(run_id="r", policy="off", host_params=5)
    told.hear(boundary(10, 1.5))
    journal(tmp_path, [boundary(10, None)])
    write_json(tmp_path / "growth.json", growth_summary(told))
    assert read_chronicle(tmp_path).decision_losses == [(10, 1.5)]


def test_an_empty_folder_holds_an_empty_run(tmp_path: Path) -> None:
    assert read_chronicle(tmp_path) == Chronicle()


def test_a_damaged_line_is_left_out_and_said(tmp_path: Path) -> None:
    journal(tmp_path, [boundary(10)])
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"type": "EpochEv\n')
    with pytest.warns(UserWarning, match="1 lines of .*events.jsonl cannot be read"):
        assert read_chronicle(tmp_path).last_step == 10


def test_the_summary_tells_what_happened(tmp_path: Path) -> None:
    chronicle = story(lives=2)
    chronicle.curve.add(101, math.nan)
    write_json(tmp_path / "growth.json", growth_summary(chronicle, "name"))
    found = json.loads((tmp_path / "growth.json").read_text(), parse_constant=pytest.fail)
    assert found["params"] == {"before": 1000, "added": 500, "after": 1500}
    assert [graft["reason"] for graft in found["grafts"]] == ["GATE_PASSED", "OUTCOMPETED"]
    assert found["grafts"][0]["lower"] == pytest.approx(0.08) and found["grafts"][0]["price"] == 0.005
    assert found["explanations"] == [{"step": 20, "text": "a trial"}]
    assert found["losses"]["train"][-1] == [101, None] and found["losses"]["decision"][-1] == [100, 2.01]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another output folder"):
        require_writable(tmp_path / "file" / "run")
    with pytest.raises(OutputError, match="cannot write"):
        write_json(tmp_path / "missing" / "growth.json", {})
    assert require_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
