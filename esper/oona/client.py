"""The bus of one process that talks to a broker over ZeroMQ."""

import logging
import threading
import time
from collections.abc import Callable
from typing import final

from esper.leyline.base import Message
from esper.leyline.codec import encode, seal
from esper.leyline.envelope import Envelope, Priority, event_topic
from esper.leyline.errors import BusError, ContractError, EsperError, SchemaMismatch
from esper.leyline.events import SecurityAlert, Violation
from esper.leyline.ids import new_id
from esper.oona import wire
from esper.oona.contracts import NO_OFFSET, Bus, BusLimits, Delivery, Subscription, is_journalled
from esper.oona.exchange import check_names, check_version, open_letter
from esper.oona.keys import CurveKeys
from esper.oona.link import Link
from esper.oona.queue import PriorityQueue

_FAREWELL_S = 2.0
_log = logging.getLogger(__name__)


@final
class ZmqBus(Bus):
    """A client of a broker: publishes, subscribes, and survives the broker's death and return.

    Args:
        address: where the broker listens, `ipc://...` or `tcp://host:port`.
        sender: who its messages come from.
        keys: our pair with the broker's public key; `None` for a broker without keys.
        limits: its `publish_timeout_s` is the longest time that any request waits, its `telemetry_capacity` the
            telemetry that waits to be sent; the rest is the broker's business.

    Raises:
        BusError: the address is malformed; whether a broker is there shows with the first request.

    Example:
        >>> import tempfile
        >>> from esper.leyline.events import KernelReady
        >>> from esper.oona.broker import Broker
        >>> with tempfile.TemporaryDirectory() as folder, Broker(folder, "tcp://127.0.0.1:*") as broker:
        ...     with ZmqBus(broker.address, "me") as bus, bus.subscribe("compilation", group="readers") as readers:
        ...         _ = bus.publish(KernelReady(kernel_artifact_id="k", blueprint_id="b", pipeline="fast"),
        ...                         "compilation.ready")
        ...         delivery = readers.receive(timeout_s=5.0)
        ...         readers.ack(delivery)
        >>> delivery.envelope.sender, delivery.message.kernel_artifact_id
        ('me', 'k')
    """

    def __init__(
        self, address: str, sender: str, keys: CurveKeys | None = None, *, limits: BusLimits | None = None
    ) -> None:
        """Connect in the background."""
        self.address, self.sender = address, sender
        self.limits = limits if limits is not None else BusLimits()
        self._subscriptions: dict[str, _ZmqSubscription] = {}
        self._closed = False
        self._link = Link(
            address,
            keys,
            hear=self._hear,
            lost=self._lost,
            beat=self._beat,
            telemetry_capacity=self.limits.telemetry_capacity,
        )

    @property
    def dropped(self) -> int:
        """Telemetry that was given up before it could be sent."""
        return self._link.dropped

    def publish(
        self, message: Message, topic: str, *, priority: Priority = Priority.NORMAL, trace_id: str = ""
    ) -> Envelope:
        """Send a message, and wait until the broker has it in its journal; telemetry does not wait."""
        try:
            check_version(message)
            envelope = seal(message, topic, self.sender, priority=priority, trace_id=trace_id)
        except SchemaMismatch as error:
            self._refuse(self.sender, error)
            raise
        except ContractError:
            raise
        except ValueError as error:
            raise ContractError(f"The envelope of {type(message).__name__} is malformed: {error}") from error
        if is_journalled(topic):
            self._ask(wire.PUBLISH, encode(envelope))
        else:
            self._link.offer(encode(envelope))
        return envelope

    def _ask(self, verb: bytes, body: bytes) -> int:
        return self._link.ask(verb, body, self.limits.publish_timeout_s)

    def _refuse(self, subject: str, error: EsperError) -> None:
        """Record that a letter was refused; the refusal stands whether or not that succeeds."""
        alert = SecurityAlert(source="oona", subject=subject, violation=Violation.PERMISSION, detail=str(error))
        envelope = seal(alert, event_topic("SecurityAlert"), self.sender, priority=Priority.HIGH)
        try:
            self._link.post(wire.PUBLISH, encode(envelope), lambda _: None)
        except EsperError as failure:
            _log.warning("An alert could not be sent: %s", failure)

    def subscribe(self, *topics: str, group: str = "", since: int | None = None) -> Subscription:
        """Listen to topics."""
        check_names(topics, group)
        name = f"{self.sender}/{new_id()}"
        subscription = _ZmqSubscription(name, topics, group, self._link, self._part, self._refuse)
        self._subscriptions[name] = subscription
        try:
            subscription._resume = self._ask(wire.SUBSCRIBE, subscription._request(since))
        except BaseException:
            self._part(name)
            raise
        subscription._beat()
        return subscription

    def forget(self, group: str) -> None:
        """Remove a group and what waits for it."""
        self._ask(wire.FORGET, wire.pack(group=group))

    def close(self) -> None:
        """End every subscription and the connection."""
        if self._closed:
            return
        self._closed = True
        for subscription in list(self._subscriptions.values()):
            subscription.close()
        self._link.close()

    def _part(self, name: str) -> None:
        self._subscriptions.pop(name, None)

    # --- in the link's thread ---------------------------------------------------------------------------------------

    def _hear(self, name: str, head: bytes, data: bytes) -> None:
        if (subscription := self._subscriptions.get(name)) is not None:
            fields = wire.unpack(head, offset=int, priority=int)
            subscription._arrive(fields["offset"], Priority(fields["priority"]), data)

    def _lost(self, name: str) -> None:
        if (subscription := self._subscriptions.get(name)) is not None:
            subscription._rejoin()

    def _beat(self, reconnected: bool) -> None:
        for subscription in list(self._subscriptions.values()):
            if reconnected:
                subscription._rejoin()
            else:
                subscription._beat()


@final
class _ZmqSubscription(Subscription):
    """Letters that the broker has sent ahead, in order of priority; acknowledgements that it has not confirmed."""

    def __init__(
        self,
        name: str,
        topics: tuple[str, ...],
        group: str,
        link: Link,
        part: Callable[[str], None],
        refuse: Callable[[str, EsperError], None],
    ) -> None:
        self._name, self._topics, self._group = name, topics, group
        self._link, self._part, self._refuse = link, part, refuse
        self._changed = threading.Condition()
        self._queue = PriorityQueue[tuple[int, bytes]]()
        self._held: set[int] = set()
        self._done: set[int] = set()
        self._arrivals = self._granted = 0
        self._resume = 0
        self._closed = self._joining = False

    def receive(self, timeout_s: float) -> Delivery | None:
        """Wait for the next letter and decode it."""
        taken = self._take(time.monotonic() + timeout_s)
        if taken is None:
            return None
        offset, data = taken
        try:
            envelope, message = open_letter(data)
        except ContractError as error:
            self._ack(offset)
            self._refuse(f"letter {offset} for {self._name}", error)
            raise
        return Delivery(envelope, offset, message)

    def _take(self, deadline: float) -> tuple[int, bytes] | None:
        with self._changed:
            while not self._queue:
                self._check()
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return None
                self._changed.wait(min(remaining, 0.5))
            self._check()
            offset, data = self._queue.pop()
            self._held.discard(offset)
        self._ask_for_more()
        return offset, data

    def _check(self) -> None:
        self._link.check()
        if self._closed:
            raise BusError("The subscription is closed; subscribe again.")

    def ack(self, delivery: Delivery) -> None:
        """Mark the letter as done; the broker hears of it in the background, as often as it takes."""
        self._ack(delivery.offset)

    def _ack(self, offset: int) -> None:
        with self._changed:
            if offset == NO_OFFSET or offset in self._done or self._closed:
                return
            self._done.add(offset)
        self._post_ack(offset)

    def _post_ack(self, offset: int) -> None:
        body = wire.pack(name=self._name, offsets=[offset])
        try:
            self._link.post(wire.ACK, body, lambda result: self._confirm(offset, result))
        except EsperError as error:
            _log.warning("Letter %d could not be acknowledged and will come again: %s", offset, error)

    def _confirm(self, offset: int, result: int | EsperError) -> None:
        with self._changed:
            if isinstance(result, int):
                self._done.discard(offset)
            self._changed.notify_all()

    def close(self) -> None:
        """Wait a moment for the acknowledgements to be confirmed, then leave."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            patience_s = _FAREWELL_S if self._link.up else 0.0
            self._changed.wait_for(lambda: not self._done, patience_s)
            self._changed.notify_all()
        self._part(self._name)
        try:
            self._link.ask(wire.LEAVE, wire.pack(name=self._name), patience_s)
        except EsperError as error:
            _log.warning("Subscription %s could not sign off; it will be missed: %s", self._name, error)

    # --- in the link's thread ---------------------------------------------------------------------------------------

    def _request(self, since: int | None) -> bytes:
        return wire.pack(
            name=self._name, topics=list(self._topics), group=self._group, since=since, resume=self._resume
        )

    def _rejoin(self) -> None:
        """Subscribe again after a reconnect; what was not acknowledged comes again."""
        if not (self._joining or self._closed) and self._resume:
            self._joining = True
            self._link.post(wire.SUBSCRIBE, self._request(None), self._rejoined)

    def _rejoined(self, result: int | EsperError) -> None:
        self._joining = False
        if isinstance(result, EsperError):
            _log.warning("Subscription %s could not be taken up again: %s", self._name, result)
        self._beat()

    def _beat(self) -> None:
        """Say that we live, how much room there is, and which letters nobody has looked at."""
        with self._changed:
            room = max(0, wire.WINDOW - len(self._queue))
            self._granted = room
            held = sorted(self._held)
        self._link.tell(wire.PULL, wire.pack(name=self._name, room=room, held=held))

    def _ask_for_more(self) -> None:
        if max(self._granted, len(self._queue)) <= wire.WINDOW // 2:
            self._beat()

    def _arrive(self, offset: int, priority: Priority, data: bytes) -> None:
        """Queue a letter, unless it is here already or done with."""
        with self._changed:
            self._granted = 0 if len(data) > wire.LARGE_BYTES else self._granted - 1
            done = offset in self._done
            if not done and (offset == NO_OFFSET or offset not in self._held):
                self._arrivals += 1
                self._queue.push(priority, self._arrivals, (offset, data))
                if offset != NO_OFFSET:
                    self._held.add(offset)
                    self._resume = max(self._resume, offset + 1)
                self._changed.notify_all()
        if done:
            self._post_ack(offset)
        self._ask_for_more()
