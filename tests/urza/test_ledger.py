"""The chain shows every single edit, and recovers from a writer's death by saying so."""

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from esper.leyline.errors import StoreError
from esper.urza.ledger import Ledger, Note
from esper.urza.records import Head
from tests.urza.samples import compiled, opened, validated, verdict

notes = st.lists(
    st.builds(
        Note, st.sampled_from(["karn", ""]), st.text(max_size=8), st.text(max_size=8), detail=st.text(max_size=8)
    ),
    min_size=1,
    max_size=5,
)


def written(path: Path, batches: list[list[Note]]) -> tuple[Ledger, Head]:
    path.unlink(missing_ok=True)
    ledger, head = Ledger(path), Head()
    for batch in batches:
        head = ledger.append(head, batch)
    return ledger, head


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger") / "ledger.jsonl"


@given(batches=st.lists(notes, min_size=1, max_size=3), data=st.data())
def test_any_single_edit_is_noticed(path: Path, batches: list[list[Note]], data: st.DataObject) -> None:
    ledger, head = written(path, batches)
    assert ledger.verify(head) == []
    whole = path.read_bytes()
    at = data.draw(st.integers(0, 2**20)) % len(whole)
    cut = data.draw(st.integers(0, 3))
    put = data.draw(st.binary(max_size=3))
    edited = whole[:at] + put + whole[at + cut :]
    assume(edited != whole)
    path.write_bytes(edited)
    assert ledger.verify(head) != []


@given(batches=st.lists(notes, min_size=2, max_size=4), data=st.data())
def test_lines_cannot_be_left_out_or_swapped(path: Path, batches: list[list[Note]], data: st.DataObject) -> None:
    ledger, head = written(path, batches)
    lines = path.read_bytes().splitlines(keepends=True)
    shuffled = data.draw(st.permutations(lines))
    kept = shuffled[: data.draw(st.integers(0, len(lines)))]
    assume(kept != lines)
    path.write_bytes(b"".join(kept))
    assert ledger.verify(head) != []


def test_a_chain_forged_from_the_start_does_not_fit_the_records(path: Path) -> None:
    _, head = written(path, [[Note("karn", "submit", "a")]])
    forged, other = written(path, [[Note("karn", "submit", "b")]])
    assert forged.verify(other) == []
    assert forged.verify(head) != []


@pytest.mark.parametrize("cut", [0, 1, 10, -1])
def test_what_a_killed_writer_left_is_moved_aside(tmp_path: Path, cut: int) -> None:
    with opened(tmp_path) as urza:
        urza.put(compiled())
        head = urza.core.records.head()
        with urza.ledger.locked():
            urza.ledger.append(head, [Note("tezzeret", "status", "a"), Note("tezzeret", "status", "b")])
        path = urza.ledger.path
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) + cut] if cut < 0 else whole[: head.size + cut] if cut else whole)
        left = path.read_bytes()[head.size :]
        assert urza.check() != []

        urza.judge(verdict())
        assert urza.check() == []
        assert [entry.action for entry in urza.ledger.entries()] == ["status", "recovered", "status"]
        (aside,) = path.parent.glob("ledger.torn-*.jsonl")
        assert aside.read_bytes() == left


def test_more_than_one_unfinished_change_is_no_crash(tmp_path: Path) -> None:
    """The records were put back to an older copy: the ledger knows more, and nothing is written over it."""
    with opened(tmp_path) as urza:
        urza.put(compiled())
        old = urza.core.records.head()
        urza.judge(verdict())
        urza.interest("k1", "karn", 0.5)
        urza.core.records.set_head(old)
        with pytest.raises(StoreError, match="more than one"):
            urza.reject("k1", "fault")
        assert "ledger" in {finding.subject for finding in urza.check()}


def test_a_cut_ledger_stops_writers_until_somebody_restarts_it(tmp_path: Path) -> None:
    with opened(tmp_path) as urza:
        validated(urza)
        path = urza.ledger.path
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-1]))
        assert [finding.subject for finding in urza.check()] == ["ledger", "k1"]
        with pytest.raises(StoreError, match="it was cut"):
            urza.put(compiled("k2"))
        assert urza.verified("k1").manifest.kernel_id == "k1"

        moved = urza.restart_ledger("a test cut it")
        assert path.with_name(moved.split()[0]).read_bytes() == lines[0]
        assert urza.check() == []
        validated(urza, "k2")
        assert next(iter(urza.ledger.entries())).detail.startswith("a test cut it; 2 entries are in ")


def test_other_text_at_the_end_is_not_taken_for_a_crash(tmp_path: Path) -> None:
    with opened(tmp_path) as urza:
        urza.put(compiled())
        with urza.ledger.path.open("ab") as file:
            file.write(b"something else\n")
        with pytest.raises(StoreError, match="written to by somebody else"):
            urza.judge(verdict())
