"""Whatever happens in whatever order: what a group has acknowledged and what it has not is what was published."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from esper.leyline import ContractError, KernelReady, Priority, encode, seal
from esper.oona import BusLimits
from esper.oona.contracts import matches
from esper.oona.exchange import Exchange, Sealed, open_letter
from esper.oona.journal import Journal

TOPICS = ("compilation.ready", "compilation.requested", "validation.rejected")
GROUPS = {"all": ("compilation", "validation"), "ready": ("compilation.ready",), "late": ("validation",)}


def sealed(number: int, topic: str, priority: Priority) -> Sealed:
    message = KernelReady(kernel_artifact_id=str(number), blueprint_id="b", pipeline="fast")
    envelope = seal(message, topic, "test", priority=priority)
    return Sealed(envelope, encode(envelope))


class Schedule(RuleBasedStateMachine):
    """Publishers, members that come, go and acknowledge, and a broker that dies, in any order."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.published: dict[int, Sealed] = {}
        self.owed: dict[str, set[int]] = {}
        self.acked: dict[str, set[int]] = {}
        self.members: dict[str, str] = {}
        self.held: dict[str, list[int]] = {}
        self.open()
        for group in ("all", "ready"):
            self.join(group)

    def open(self) -> None:
        journal = Journal(Path(self.folder.name) / "journal")
        self.exchange = Exchange(journal, BusLimits(retention=10_000))
        self.journal = journal

    @rule(group=st.sampled_from(sorted(GROUPS)))
    def join(self, group: str) -> None:
        name = f"{group}/{len(self.held)}"
        self.exchange.join(name, GROUPS[group], group, None)
        self.members[name], self.held[name] = group, []
        self.owed.setdefault(group, set())
        self.acked.setdefault(group, set())

    @rule(topic=st.sampled_from(TOPICS), priorities=st.lists(st.sampled_from(list(Priority)), min_size=1, max_size=8))
    def publish(self, topic: str, priorities: list[Priority]) -> None:
        letters = [sealed(len(self.published) + n, topic, priority) for n, priority in enumerate(priorities)]
        offsets = self.exchange.accept(letters)
        assert self.exchange.accept(letters) == offsets, "a letter that came twice was kept twice"
        for offset, letter in zip(offsets, letters, strict=True):
            assert isinstance(offset, int)
            self.published[offset] = letter
            for group in self.owed:
                if matches(topic, GROUPS[group]):
                    self.owed[group].add(offset)

    @precondition(lambda self: self.members)
    @rule(data=st.data(), count=st.integers(1, 5))
    def receive(self, data: st.DataObject, count: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.members)))
        group = self.members[name]
        leased = {offset for member, held in self.held.items() if self.members.get(member) == group for offset in held}
        for _ in range(count):
            ready = self.owed[group] - self.acked[group] - leased
            taken = self.exchange.take(name)
            if taken is None:
                assert not ready
                return
            first = min(ready, key=lambda offset: (self.published[offset].envelope.priority, offset))
            assert taken.offset == first, "not the most urgent, or not the oldest of those"
            assert taken.data == self.published[first].data
            self.held[name].append(first)
            leased.add(first)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, held in self.held.items() if held)))
        done = data.draw(st.sets(st.sampled_from(self.held[name]), min_size=1))
        self.exchange.ack(name, sorted(done))
        self.held[name] = [offset for offset in self.held[name] if offset not in done]
        self.acked[self.members[name]] |= done

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.members)))
        self.exchange.leave(name)
        del self.members[name]
        self.held[name] = []

    @rule()
    def restart(self) -> None:
        self.exchange.close()
        self.members.clear()
        self.held = {name: [] for name in self.held}
        self.open()

    @rule(retention=st.integers(1, 20))
    def compact(self, retention: int) -> None:
        with self.journal.transaction():
            self.journal.compact(retention)
        owed = set().union(*(self.owed[group] - self.acked[group] for group in self.owed))
        newest = {offset for offset in self.published if offset >= self.journal.end - retention}
        kept = {letter.offset for letter in self.journal.replay()}
        assert kept >= owed | newest - self.gone()
        self.published = {offset: letter for offset, letter in self.published.items() if offset in kept}
        for group in self.owed:
            self.owed[group] &= kept
            self.acked[group] &= kept

    def gone(self) -> set[int]:
        return set(range(1, self.journal.end)) - self.published.keys()

    @invariant()
    def nothing_is_lost(self) -> None:
        for group, owed in getattr(self, "owed", {}).items():
            unacked = {letter.offset for letter in self.journal.pending(group)}
            assert unacked | self.acked[group] == owed
            assert not unacked & self.acked[group]
            assert self.journal.place(group) == min(unacked, default=self.journal.end)

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        since = data.draw(st.sampled_from(sorted(self.published)))
        topics = data.draw(st.sampled_from([("compilation",), ("validation", "compilation.ready"), TOPICS]))
        expected = [
            (offset, letter.data)
            for offset, letter in sorted(self.published.items())
            if offset >= since and matches(letter.envelope.topic, topics)
        ]
        assert [(letter.offset, letter.data) for letter in self.journal.replay(since, topics)] == expected

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.exchange.close()
            self.folder.cleanup()


TestSchedule = Schedule.TestCase
TestSchedule.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_nameless_subscription_is_forgotten_when_it_falls_silent() -> None:
    exchange = Exchange(Journal(":memory:"), BusLimits(silence_s=1e-6))
    exchange.join("one", ("a",), "", None, heard=0.0)
    exchange.join("two", ("a",), "", None)
    exchange.tick()
    assert (exchange.knows("one"), exchange.knows("two")) == (False, True)


def test_a_group_that_was_long_absent_is_forgotten_at_the_start(tmp_path: Path) -> None:
    for absence_s, expected in ((1e6, 1), (1e-9, 0)):
        exchange = Exchange(Journal(tmp_path / "journal"), BusLimits(absence_s=absence_s))
        if absence_s == 1e6:
            exchange.join("one", ("a",), "readers", None)
            exchange.accept([sealed(1, "a", Priority.NORMAL)])
        exchange.close()
        journal = Journal(tmp_path / "journal")
        assert len(journal.pending("readers")) == len(journal.groups()) == expected
        journal.close()


def test_the_journal_stays_bounded(tmp_path: Path) -> None:
    exchange = Exchange(Journal(tmp_path / "journal"), BusLimits(retention=100))
    exchange.join("one", ("a",), "readers", None)
    sizes = []
    for _ in range(6):
        for number in range(1_000):
            (offset,) = exchange.accept([sealed(number, "a", Priority.NORMAL)])
            assert isinstance(offset, int)
            exchange.ack("one", [offset])
        sizes.append((tmp_path / "journal").stat().st_size)
    assert sizes[-1] <= 1.5 * sizes[2]
    exchange.close()


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x92\xa3abc\x80", encode(sealed(1, "a", Priority.LOW).envelope)[:-1]])
def test_what_is_no_letter_is_a_contract_error(data: bytes) -> None:
    with pytest.raises(ContractError):
        open_letter(data)
