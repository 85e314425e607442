"""A tail over files that grow, are cut and are replaced, as a run that resumes does."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.errors import BusError, ConfigError, ContractError
from esper.nissa.watch.source import EVENTS, PIECE, Folder, Listing, Mark, Source, Tail


def append(folder: Path, text: str) -> None:
    with (folder / EVENTS).open("a") as file:
        file.write(text)


@given(st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=30)), st.data())
def test_every_line_is_read_once_however_it_is_cut(lines: list[str], data: st.DataObject) -> None:
    whole = "".join(f"{line}\n" for line in lines).encode()
    source, place, found = Pieces(b""), 0, []
    tail = Tail(source, EVENTS)
    while place < len(whole):
        place = data.draw(st.integers(place + 1, len(whole)))
        source.content = whole[:place]
        found += tail.read()
    assert [line.decode() for line in found] == lines and not tail.restarted
    assert source.read_bytes <= len(whole) * 2 + 300 * len(lines) + 300 * source.looks


class Pieces(Source):
    """A file in memory that counts what is read of it, and may stop answering."""

    def __init__(self, content: bytes) -> None:
        self.name, self.content, self.read_bytes, self.looks, self.answers = "memory", content, 0, 0, 10**9

    def look(self) -> Listing:
        self.looks += 1
        return Listing(0.0, {EVENTS: Mark(len(self.content), 0)})

    def read(self, file: str, offset: int, size: int) -> bytes:
        self.answers -= 1
        if self.answers < 0:
            raise BusError("gone")
        found = self.content[offset : offset + size]
        self.read_bytes += len(found)
        return found


def test_only_what_is_new_is_read() -> None:
    source = Pieces(b"x" * 99 + b"\n")
    source.content *= 1000
    tail = Tail(source, EVENTS)
    assert len(tail.read()) == 1000
    before = source.read_bytes
    source.content += b"new\n"
    assert tail.read() == [b"new"] and source.read_bytes - before < 1000


def test_a_file_larger_than_a_piece(tmp_path: Path) -> None:
    line = "y" * 70_000
    append(tmp_path, f"{line}\n" * 40)
    assert (tmp_path / EVENTS).stat().st_size > 2 * PIECE
    assert Tail(Folder(tmp_path), EVENTS).read() == [line.encode()] * 40


def test_a_half_line_is_waited_for(tmp_path: Path) -> None:
    tail = Tail(Folder(tmp_path), EVENTS)
    assert tail.read() == []
    append(tmp_path, "one\ntw")
    assert tail.read() == [b"one"]
    append(tmp_path, "o\n")
    assert tail.read() == [b"two"] and tail.read() == [] and not tail.restarted


@pytest.mark.parametrize("after", ["one\n", "one\nother\nmore\n", "another\nfile\nof\nthat\nkind\n", ""])
def test_a_file_that_was_cut_or_replaced_is_started_over(tmp_path: Path, after: str) -> None:
    append(tmp_path, "one\ntwo\n")
    tail = Tail(Folder(tmp_path), EVENTS)
    assert tail.read() == [b"one", b"two"]
    (tmp_path / "new").write_text(after)
    (tmp_path / "new").replace(tmp_path / EVENTS)
    assert tail.read() == after.encode().split() and tail.restarted
    append(tmp_path, "last\n")
    assert tail.read() == [b"last"] and not tail.restarted


def test_a_file_that_is_gone_is_started_over(tmp_path: Path) -> None:
    append(tmp_path, "one\n")
    tail = Tail(Folder(tmp_path), EVENTS)
    tail.read()
    (tmp_path / EVENTS).unlink()
    assert tail.read() == [] and tail.restarted
    append(tmp_path, "one\n")
    assert tail.read() == [b"one"]


def test_nothing_is_lost_when_a_source_stops_answering_halfway() -> None:
    source = Pieces(b"line\n" * PIECE)
    tail = Tail(source, EVENTS)
    source.answers = 3
    with pytest.raises(BusError):
        tail.read()
    source.answers = 10**9
    assert len(tail.read()) == PIECE


def test_no_other_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = Folder(tmp_path)
    for name, offset, size in (("secret", 0, 1), ("../secret", 0, 1), (EVENTS, -1, 1), (EVENTS, 0, PIECE + 1)):
        with pytest.raises(ContractError, match="not to be watched"):
            folder.read(name, offset, size)
    assert folder.look().files == {} and folder.read(EVENTS, 0, 10) == b""
    with pytest.raises(ConfigError, match="is no folder; give the one that a run writes"):
        Folder(tmp_path / "missing")
