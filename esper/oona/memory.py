"""The bus inside one process: the same contract as the one between processes, without sockets or threads."""

import threading
import time
from typing import final

from esper.leyline.base import Message
from esper.leyline.codec import encode, seal
from esper.leyline.envelope import Envelope, Priority
from esper.leyline.errors import BusError, ContractError, EsperError, SchemaMismatch
from esper.leyline.ids import new_id
from esper.oona.contracts import Bus, BusLimits, Delivery, Subscription, is_journalled
from esper.oona.exchange import ConsumerFull, Exchange, Sealed, Taken, check_version, open_letter
from esper.oona.journal import Journal


@final
class MemoryBus(Bus):
    """A bus for the threads of one process; its journal is in memory and ends with it.

    Args:
        limits: bounds of the bus.
        sender: who its messages come from.

    Example:
        >>> from esper.leyline.events import KernelReady
        >>> with MemoryBus() as bus, bus.subscribe("compilation") as subscription:
        ...     _ = bus.publish(KernelReady(kernel_artifact_id="k", blueprint_id="b", pipeline="fast"),
        ...                     "compilation.ready")
        ...     delivery = subscription.receive(timeout_s=1.0)
        ...     subscription.ack(delivery)
        >>> delivery.offset, delivery.message.kernel_artifact_id
        (1, 'k')
    """

    def __init__(self, limits: BusLimits | None = None, *, sender: str = "esper") -> None:
        """Make a bus that nobody listens to."""
        self.limits = limits if limits is not None else BusLimits()
        self.sender = sender
        self._exchange = Exchange(Journal(":memory:"), self.limits)
        self._changed = threading.Condition()
        self._closed = False

    def publish(
        self, message: Message, topic: str, *, priority: Priority = Priority.NORMAL, trace_id: str = ""
    ) -> Envelope:
        """Queue a message for everyone who listens; wait while a consumer's queue is full."""
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
        letter = Sealed(envelope, encode(envelope))
        with self._changed:
            self._check_open()
            if is_journalled(topic):
                self._accept(letter)
            else:
                self._exchange.offer(letter)
            self._changed.notify_all()
        return envelope

    def _accept(self, letter: Sealed) -> None:
        deadline = time.monotonic() + self.limits.publish_timeout_s
        while isinstance(result := self._exchange.accept([letter])[0], EsperError):
            remaining = deadline - time.monotonic()
            if not isinstance(result, ConsumerFull) or remaining <= 0:
                raise result
            self._changed.wait(remaining)
            self._check_open()

    def _refuse(self, sender: str, error: ContractError) -> None:
        with self._changed:
            self._exchange.alert("oona", sender, str(error))
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise BusError("The bus is closed; make a new one.")

    def subscribe(self, *topics: str, group: str = "", since: int | None = None) -> Subscription:
        """Listen to topics."""
        name = f"{self.sender}/{new_id()}"
        with self._changed:
            self._check_open()
            self._exchange.join(name, topics, group, since)
            return _MemorySubscription(self, name)

    def forget(self, group: str) -> None:
        """Remove a group and what waits for it."""
        with self._changed:
            self._check_open()
            self._exchange.forget(group)
            self._changed.notify_all()

    def close(self) -> None:
        """End every subscription."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._exchange.close()
            self._changed.notify_all()


@final
class _MemorySubscription(Subscription):
    """A member of the bus's exchange."""

    def __init__(self, bus: MemoryBus, name: str) -> None:
        self._bus, self._name = bus, name
        self._closed = False

    def receive(self, timeout_s: float) -> Delivery | None:
        """Wait for the next letter and decode it."""
        taken = self._take(time.monotonic() + timeout_s)
        if taken is None:
            return None
        try:
            envelope, message = open_letter(taken.data)
        except ContractError as error:
            self._ack(taken.offset)
            self._bus._refuse(f"letter {taken.offset} for {self._name}", error)
            raise
        return Delivery(envelope, taken.offset, message)

    def _take(self, deadline: float) -> Taken | None:
        bus = self._bus
        with bus._changed:
            while True:
                self._check_open()
                next_expiry_s = bus._exchange.tick()
                if (taken := bus._exchange.take(self._name)) is not None:
                    return taken
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return None
                bus._changed.wait(min(remaining, max(next_expiry_s, 0.0)))

    def _check_open(self) -> None:
        self._bus._check_open()
        if self._closed or not self._bus._exchange.knows(self._name):
            raise BusError("The subscription is closed, or its group was forgotten; subscribe again.")

    def ack(self, delivery: Delivery) -> None:
        """Mark the letter as done."""
        self._ack(delivery.offset)

    def _ack(self, offset: int) -> None:
        with self._bus._changed:
            if not self._bus._closed:
                self._bus._exchange.ack(self._name, [offset])
                self._bus._changed.notify_all()

    def close(self) -> None:
        """Leave the group."""
        with self._bus._changed:
            if not (self._closed or self._bus._closed):
                self._bus._exchange.leave(self._name)
            self._closed = True
            self._bus._changed.notify_all()
