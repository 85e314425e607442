"""Following a run: at every moment what is told equals what its whole folder tells."""

from pathlib import Path

import pytest

from esper.leyline.base import Message
from esper.leyline.codec import to_json
from esper.leyline.errors import BusError
from esper.leyline.events import RunEvent
from esper.nissa.folder import growth_summary, read_chronicle, write_json
from esper.nissa.watch.follow import Follower
from esper.nissa.watch.live import FILE, Live
from esper.nissa.watch.source import Folder, Listing, Source
from esper.tamiyo.journal import Journal
from tests.nissa.pages import run_folder
from tests.nissa.stories import boundary, story


def says(folder: Path, **told: object) -> None:
    (folder / FILE).write_text(Live.model_validate({"run_id": "r", "title": "demo"} | told).model_dump_json())


def of_run(messages: list[Message], run_id: str) -> list[Message]:
    return [message.model_copy(update={"run_id": run_id}) for message in messages]


def test_at_every_moment_it_tells_what_the_folder_tells(tmp_path: Path) -> None:
    follower = Follower(Folder(tmp_path))
    assert not follower.look().begun
    log = Journal(tmp_path)
    for message in story(lives=4).messages:
        log.write(message)
        assert follower.look().chronicle == read_chronicle(tmp_path)
    log.close()


@pytest.mark.parametrize("polls", [True, False])
def test_a_resumed_run_is_told_from_where_it_went_on(tmp_path: Path, polls: bool) -> None:
    messages = story(lives=2).messages
    half = next(i for i, m in enumerate(messages) if isinstance(m, RunEvent) and m.step > 40)
    log, follower = Journal(tmp_path), Follower(Folder(tmp_path))
    for message in messages[:half]:
        log.write(message)
    cursor = log.cursor("r")
    for message in messages[half:-4]:
        log.write(message)
    log.close()
    follower.look()
    again = Journal(tmp_path, cursor)
    for message in messages[half:]:
        again.write(message)
        if polls:
            follower.look()
    again.close()
    assert follower.look().chronicle == read_chronicle(tmp_path)
    assert follower.look().chronicle.steps == 100


def test_another_run_in_the_same_folder_takes_over(tmp_path: Path) -> None:
    log, follower = Journal(tmp_path), Follower(Folder(tmp_path))
    says(tmp_path, state="ended")
    for message in story().messages:
        log.write(message)
    assert follower.look().over
    says(tmp_path, run_id="s", state="running", step=1)
    sight = follower.look()
    assert not sight.over and sight.chronicle.run_id == "s" and sight.chronicle.messages == [] and sight.begun
    for message in of_run(story(lives=1).messages, "s"):
        log.write(message)
    assert len(follower.look().chronicle.lives()) == 1
    log.close()


def test_live_tells_what_boundaries_do_not(tmp_path: Path) -> None:
    follower = Follower(Folder(tmp_path))
    says(tmp_path, step=7, host_params=30, policy="schedule", time=100.0)
    sight = follower.look()
    assert (sight.step, sight.title, sight.over, sight.begun) == (7, "demo", False, True)
    assert (sight.chronicle.host_params, sight.chronicle.policy) == (30, "schedule")
    assert sight.silence_s > 1000
    (tmp_path / FILE).write_text('{"run_id": "r", "st')
    assert follower.look().step == 7
    says(tmp_path, step=9, state="stopped", detail="by request")
    assert follower.look().over and follower.look().step == 9


def test_an_ended_run_has_its_summary_and_a_resumed_one_does_not(tmp_path: Path) -> None:
    chronicle = story(lives=1)
    run_folder(tmp_path, chronicle, "digits")
    sight = Follower(Folder(tmp_path)).look()
    assert sight.over and sight.title == "digits" and sight.chronicle.curve == chronicle.curve
    says(tmp_path, state="running")
    follower = Follower(Folder(tmp_path))
    assert not follower.look().over and follower.look().chronicle.curve.points == []
    says(tmp_path, state="ended", step=100)
    assert follower.look().over and follower.look().chronicle.curve == chronicle.curve


def test_a_summary_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    run_folder(tmp_path, story())
    (tmp_path / "growth.json").write_text('{"run_id": ')
    follower = Follower(Folder(tmp_path))
    assert not follower.look().over
    write_json(tmp_path / "growth.json", growth_summary(story()))
    assert follower.look().over


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"type": "Nonsense"}\n\x00\n' + to_json(boundary(10)) + "\n")
    sight = Follower(Folder(tmp_path)).look()
    assert sight.damaged == 2 and sight.step == 10


class Flaky(Source):
    """A folder that sometimes does not answer, also halfway."""

    def __init__(self, folder: Path) -> None:
        self.inner, self.name, self.answers = Folder(folder), "flaky", 10**9

    def _count(self) -> None:
        self.answers -= 1
        if self.answers < 0:
            raise BusError("no answer")

    def look(self) -> Listing:
        self._count()
        return self.inner.look()

    def read(self, file: str, offset: int, size: int) -> bytes:
        self._count()
        return self.inner.read(file, offset, size)


@pytest.mark.parametrize("answers", range(12))
def test_what_was_known_stays_while_nobody_answers(tmp_path: Path, answers: int) -> None:
    run_folder(tmp_path, story(lives=2))
    source = Flaky(tmp_path)
    follower = Follower(source)
    source.answers = answers
    first = follower.look()
    assert (first.problem == "no answer") == (source.answers < 0)
    source.answers = 10**9
    assert follower.look().problem == "" and follower.look().chronicle == read_chronicle(tmp_path)
    source.answers = 0
    lost = follower.look()
    assert lost.problem == "no answer" and lost.chronicle == read_chronicle(tmp_path)
