"""The exchange: who gets which letter; the one core of the in-process bus and of the broker."""

import logging
import re
import time
from collections.abc import Iterable, Sequence
from math import inf
from typing import NamedTuple, final

from esper.leyline.base import Message
from esper.leyline.codec import REGISTRY, decode, encode, seal, unseal
from esper.leyline.envelope import Envelope, Priority, event_topic
from esper.leyline.errors import BusError, ContractError, EsperError, SchemaMismatch
from esper.leyline.events import SecurityAlert, SlowConsumer, Violation
from esper.oona.contracts import NO_OFFSET, BusLimits, matches
from esper.oona.groups import Group, Member
from esper.oona.journal import Journal

SENDER = "oona"
"""Sender of the bus's own events."""

_TOPIC = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_GROUP = re.compile(r"[A-Za-z0-9_.:-]{1,100}")
_ALERT_INTERVAL_S = 10.0
_COMPACT_EVERY = 1_000
_HEARD_EVERY_S = 3_600.0
_log = logging.getLogger(__name__)


class ConsumerFull(BusError):
    """A consumer's queue is full: the publisher may try again."""


class Sealed(NamedTuple):
    """An envelope and its encoded form."""

    envelope: Envelope
    data: bytes


class Taken(NamedTuple):
    """A letter on its way to a member."""

    offset: int
    priority: int
    data: bytes


@final
class Exchange:
    """Routes letters from publishers to members of groups; not safe for several threads by itself.

    Args:
        journal: where letters are kept; closed with the exchange.
        limits: bounds of the bus.
    """

    def __init__(self, journal: Journal, limits: BusLimits) -> None:
        """Take up the groups that the journal knows."""
        self.limits = limits
        self._journal = journal
        self._members: dict[str, Member] = {}
        self._groups: dict[str, Group] = {}
        self._alerts: list[Message] = []
        self._alerted: dict[tuple[str, str], float] = {}
        self._arrivals = 0
        self._uncompacted = _COMPACT_EVERY
        self._next_heard = time.monotonic() + _HEARD_EVERY_S
        self._restore()

    def _restore(self) -> None:
        now = time.monotonic()
        for name, lasting, topics, heard in self._journal.groups():
            if lasting and time.time() - heard > self.limits.absence_s:
                _log.warning("Nobody listened for group %s for %.0f s; it is forgotten.", name, time.time() - heard)
                with self._journal.transaction():
                    self._journal.forget(name)
                continue
            group = self._groups[name] = Group(name, topics, lasting, self.limits)
            group.heard = now
            group.load(self._journal.pending(name), 0, now)

    # --- publishers -------------------------------------------------------------------------------------------------

    def accept(self, letters: Sequence[Sealed], *, ours: bool = False) -> list[int | EsperError]:
        """Keep letters and queue them for their groups.

        Args:
            letters: letters on journalled topics; a letter whose id the journal knows already changes nothing.
            ours: whether they are the bus's own, which never have to wait.

        Returns:
            For each letter its offset, or why it was not kept.
        """
        results: list[int | EsperError] = []
        queued: list[tuple[int, Priority, list[Group]]] = []
        try:
            with self._journal.transaction():
                results = [self._append(letter, queued, ours) for letter in letters]
        except BusError as error:
            if len(letters) > 1:
                return [self.accept([letter], ours=ours)[0] for letter in letters]
            return [error]
        now = time.monotonic()
        for offset, priority, groups in queued:
            for group in groups:
                group.push(offset, priority, now)
        for letter in letters:
            self._watch(letter.envelope.topic)
        self._compact(len(queued))
        self._flush_alerts()
        return results

    def _append(self, letter: Sealed, queued: list[tuple[int, Priority, list[Group]]], ours: bool) -> int | EsperError:
        envelope, data = letter
        if (known := self._journal.find(envelope.id)) is not None:
            return known
        groups = [group for group in self._groups.values() if matches(envelope.topic, group.topics)]
        if not ours and (full := next((group for group in groups if group.full), None)) is not None:
            allowed = f"at most {self.limits.capacity} are allowed"
            advice = "let it catch up, start it again, or forget its group"
            return ConsumerFull(f"Consumer {full.name!r} has {full.backlog} letters waiting; {allowed}: {advice}.")
        names = [group.name for group in groups]
        offset = self._journal.append(envelope.id, envelope.topic, envelope.priority, data, names)
        queued.append((offset, envelope.priority, groups))
        return offset

    def offer(self, letter: Sealed) -> None:
        """Queue telemetry for whoever listens now; the oldest is dropped where too much waits."""
        envelope, data = letter
        self._arrivals += 1
        now = time.monotonic()
        for member in self._members.values():
            if not matches(envelope.topic, self._groups[member.group].topics):
                continue
            if len(member.telemetry) >= self.limits.telemetry_capacity:
                member.telemetry.drop()
                member.dropped += 1
            member.telemetry.push(envelope.priority, self._arrivals, data, now)
            if member.dropped and member.dropped >= 2 * member.told:
                member.told = member.dropped
                self._alerts.append(self._slow_for_telemetry(member, envelope.topic, now))
        self._flush_alerts()

    @staticmethod
    def _slow_for_telemetry(member: Member, topic: str, now: float) -> SlowConsumer:
        lag_s = now - (member.telemetry.oldest or now)
        queued, dropped = len(member.telemetry), member.dropped
        return SlowConsumer(consumer=member.name, topic=topic, queued=queued, dropped=dropped, lag_s=lag_s)

    def _watch(self, topic: str) -> None:
        """Tell of each group on a topic that becomes half full, and again when it becomes full."""
        for group in self._groups.values():
            if not matches(topic, group.topics):
                continue
            share = group.backlog / self.limits.capacity
            if share < 0.25:
                group.alarm = 0
            alarm = 2 if share >= 1 else 1 if share >= 0.5 else 0
            if alarm > group.alarm:
                group.alarm = alarm
                lag_s = group.lag_s(time.monotonic())
                self._alerts.append(SlowConsumer(consumer=group.name, topic=topic, queued=group.backlog, lag_s=lag_s))

    def _compact(self, appended: int) -> None:
        self._uncompacted += appended
        if self._uncompacted >= _COMPACT_EVERY:
            self._uncompacted = 0
            try:
                with self._journal.transaction():
                    self._journal.compact(self.limits.retention)
            except BusError as error:
                _log.warning("The journal could not be compacted; it is tried again later: %s", error)

    # --- alerts -----------------------------------------------------------------------------------------------------

    def alert(self, source: str, subject: str, detail: str) -> None:
        """Record that something was refused; the same subject at most every ten seconds."""
        now = time.monotonic()
        if now - self._alerted.get((source, subject), -inf) < _ALERT_INTERVAL_S:
            return
        if len(self._alerted) >= 1_000:
            self._alerted.clear()
        self._alerted[source, subject] = now
        _log.warning("%s: %s", subject, detail)
        alert = SecurityAlert(source=source, subject=subject, violation=Violation.PERMISSION, detail=detail)
        self._alerts.append(alert)
        self._flush_alerts()

    def _flush_alerts(self) -> None:
        while self._alerts:
            alert = self._alerts.pop(0)
            envelope = seal(alert, event_topic(type(alert).__name__), SENDER, priority=Priority.HIGH)
            (result,) = self.accept([Sealed(envelope, encode(envelope))], ours=True)
            if isinstance(result, EsperError):
                _log.warning("An alert could not be kept: %s", result)

    # --- subscribers ------------------------------------------------------------------------------------------------

    def join(
        self, name: str, topics: Sequence[str], group: str, since: int | None, *, heard: float = inf, resume: int = 0
    ) -> int:
        """Add a member, or take it back after a reconnect; return the next letter's offset.

        Args:
            name: unique name of the member.
            topics: what it listens to.
            group: its group; empty for one of its own.
            since: first offset to replay, or `None`.
            heard: see `Member`.
            resume: first offset for a group that is not known any more; 0: from now on.

        Raises:
            ContractError: a topic or the group's name is malformed.
            BusError: the journal cannot be written.
        """
        known = group or name
        check_names(topics, group)
        if since is None and resume and known not in self._groups:
            since = resume
        self._set_group(known, tuple(topics), bool(group), since)
        member = self._members.setdefault(name, Member(name, known))
        member.heard = heard
        self._groups[known].release(name, time.monotonic())
        return self._journal.end

    def _set_group(self, name: str, topics: tuple[str, ...], lasting: bool, since: int | None) -> None:
        group, now = self._groups.get(name), time.monotonic()
        changed = group is None or group.topics != topics
        with self._journal.transaction():
            if changed:
                self._journal.set_group(name, lasting, topics)
            if since is not None:
                self._journal.rewind(name, topics, since)
            self._journal.heard([name])
        if group is None:
            group = self._groups[name] = Group(name, topics, lasting, self.limits)
        group.topics, group.heard = topics, now
        if changed or since is not None:
            group.load(self._journal.pending(name), self._journal.end - 1, now)

    def knows(self, name: str) -> bool:
        """Whether a member is known."""
        return name in self._members

    def hear(self, name: str, held: Iterable[int]) -> None:
        """Note that a member lives and that it holds letters which it has not looked at yet."""
        member, now = self._members[name], time.monotonic()
        member.heard = now
        self._groups[member.group].renew(name, held, now)

    def urgency(self, name: str) -> int:
        """Priority of the next letter for a member; beyond the lowest one when nothing waits for it."""
        member = self._members[name]
        return min(self._groups[member.group].urgency, member.telemetry.urgency)

    def take(self, name: str) -> Taken | None:
        """Lease the next letter to a member; `None` when nothing waits for it."""
        member = self._members[name]
        group, telemetry = self._groups[member.group], member.telemetry
        while min(group.urgency, telemetry.urgency) < len(Priority):
            if (priority := telemetry.urgency) < group.urgency:
                return Taken(NO_OFFSET, priority, telemetry.pop())
            priority, offset = group.urgency, group.lease(name, time.monotonic())
            data = self._journal.read(offset)
            if data is not None:
                return Taken(offset, priority, data)
            group.ack([offset])
        return None

    def ack(self, name: str, offsets: Sequence[int]) -> None:
        """Write down that a member is done with letters.

        Raises:
            BusError: the journal cannot be written.
        """
        member = self._members.get(name)
        offsets = [offset for offset in offsets if offset != NO_OFFSET]
        if member is None or not offsets:
            return
        with self._journal.transaction():
            self._journal.ack(member.group, offsets)
        self._groups[member.group].ack(offsets)

    def release(self, name: str) -> None:
        """Make everything ready again that a member holds."""
        member = self._members[name]
        self._groups[member.group].release(name, time.monotonic())

    def leave(self, name: str) -> None:
        """Remove a member; a group of its own goes with it."""
        member = self._members.pop(name, None)
        if member is None:
            return
        group = self._groups[member.group]
        group.release(name, time.monotonic())
        group.heard = time.monotonic()
        if not group.lasting:
            self.forget(group.name)
            return
        with self._journal.transaction():
            self._journal.heard([group.name])

    def forget(self, name: str) -> None:
        """Remove a group, its members and what waits for it; an unknown one is no error.

        Raises:
            BusError: the journal cannot be written.
        """
        with self._journal.transaction():
            self._journal.forget(name)
        self._groups.pop(name, None)
        for member in [member.name for member in self._members.values() if member.group == name]:
            del self._members[member]

    def tick(self) -> float:
        """Return letters to their queues whose time is over, and forget who is gone.

        Returns:
            Seconds until a letter's time is over; infinite when none is out.
        """
        now = time.monotonic()
        for name in [m.name for m in self._members.values() if now - m.heard > self.limits.silence_s]:
            self.leave(name)
        alive = {member.group for member in self._members.values()}
        for group in [group for group in self._groups.values() if not group.lasting and group.name not in alive]:
            if now - group.heard > self.limits.silence_s:
                self.forget(group.name)
        if now >= self._next_heard:
            self._next_heard = now + _HEARD_EVERY_S
            with self._journal.transaction():
                self._journal.heard(alive)
        return min((group.expire(now) for group in self._groups.values()), default=inf) - now

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()


def check_names(topics: Sequence[str], group: str) -> None:
    """Raise an error for names that no subscription can have.

    Raises:
        ContractError: a topic or the group's name is malformed, or there is no topic.
    """
    if not topics:
        raise ContractError("No topic is given; give at least one, e.g. 'compilation'.")
    for topic in topics:
        if not _TOPIC.fullmatch(topic):
            raise ContractError(f"{topic!r} is not a topic; write lower-case words joined by dots: 'system.events'.")
    if group and not _GROUP.fullmatch(group):
        raise ContractError(f"{group!r} is not a group's name; use 1 to 100 letters, digits and any of '_.:-'.")


def check_version(message: Message) -> None:
    """Raise an error for a message that readers of this release could not read.

    Raises:
        SchemaMismatch: its schema version has another major number.
        ContractError: its kind is none of Leyline's.
    """
    kind = type(message).__name__
    if kind not in REGISTRY:
        raise ContractError(f"{kind} is not a message of Leyline; allowed: {', '.join(REGISTRY)}.")
    known = REGISTRY[kind].SCHEMA
    if message.schema_version.partition(".")[0] != known.partition(".")[0]:
        given = f"{kind} has schema version {message.schema_version}"
        raise SchemaMismatch(f"{given}; this release writes {known}: use the same major version.")


def open_letter(data: bytes) -> tuple[Envelope, Message]:
    """Read an envelope and what is in it.

    Raises:
        SchemaMismatch: either is of another major version.
        ContractError: either is malformed.
    """
    envelope = decode(Envelope, data)
    return envelope, unseal(envelope)
