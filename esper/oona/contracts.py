"""What every message bus promises: topics, subscriptions, deliveries and the bounds of its queues."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from esper.leyline.base import Message
from esper.leyline.envelope import TELEMETRY_SEED_HEALTH, Envelope, Priority
from esper.leyline.errors import ConfigError

NO_OFFSET = 0
"""Offset of a letter that is not in the journal; the first journalled letter has offset 1."""


class Delivery(NamedTuple):
    """One letter as a subscriber gets it.

    Args:
        envelope: addressing, priority and trace id.
        offset: place in the journal, from 1; `NO_OFFSET` for telemetry.
        message: the decoded payload.
    """

    envelope: Envelope
    offset: int
    message: Message


@dataclass(frozen=True, kw_only=True)
class BusLimits:
    """Bounds of a bus.

    Args:
        capacity: letters that may wait for one consumer before publishers must wait, default 10,000.
        telemetry_capacity: telemetry that may wait for one consumer before the oldest is dropped, default 1,000.
        visibility_s: time after which a letter that was delivered and not acknowledged is delivered again, in
            seconds, default 30.
        publish_timeout_s: longest time that `publish` waits, in seconds, default 10.
        silence_s: a subscription without a group that was not heard of for so long is forgotten, in seconds,
            default 120.
        absence_s: a group that no subscriber had for so long is forgotten when the bus starts, in seconds, default
            7 days.
        retention: newest letters that stay in the journal for replay after every group has acknowledged them,
            default 100,000.

    Raises:
        ConfigError: a bound is not positive.

    Example:
        >>> BusLimits(capacity=5).capacity
        5
    """

    capacity: int = 10_000
    telemetry_capacity: int = 1_000
    visibility_s: float = 30.0
    publish_timeout_s: float = 10.0
    silence_s: float = 120.0
    absence_s: float = 7 * 86_400.0
    retention: int = 100_000

    def __post_init__(self) -> None:
        """Check that every bound is positive."""
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"BusLimits.{name} is {value!r}; it must be a positive number.")


class Subscription(ABC):
    """Letters on some topics, in order of priority and then of arrival; safe to use from several threads."""

    @abstractmethod
    def receive(self, timeout_s: float) -> Delivery | None:
        """Return the next letter, or `None` when none came in time.

        Args:
            timeout_s: longest wait in seconds; 0 only looks.

        Raises:
            SchemaMismatch: the next letter is of a version that this release cannot read; it is acknowledged and
                recorded as an event, and the next call goes on behind it.
            ContractError: the same for a letter that is no message at all.
            UnknownPeer: the bus does not admit our key.
            BusError: the subscription or the bus is closed.
        """

    @abstractmethod
    def ack(self, delivery: Delivery) -> None:
        """Say that a letter is done with, so that it is not delivered again; a second time changes nothing."""

    @abstractmethod
    def close(self) -> None:
        """End the subscription; a group keeps its place and gets again what was not acknowledged."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


class Bus(ABC):
    """At-least-once delivery by topic; safe to use from several threads.

    Everything but `telemetry.seed.health` is journalled: it is kept when `publish` returns, and delivered again until
    it is acknowledged. Telemetry is neither journalled nor confirmed, and of a consumer that lags the oldest is
    dropped and counted.
    """

    @abstractmethod
    def publish(
        self, message: Message, topic: str, *, priority: Priority = Priority.NORMAL, trace_id: str = ""
    ) -> Envelope:
        """Send a message.

        Args:
            message: what to say.
            topic: dotted address in lower case.
            priority: order of delivery.
            trace_id: shared by everything that one cause set off; empty outside a trace.

        Returns:
            The envelope that it travels in.

        Raises:
            ContractError: the topic is malformed, or the message is too long.
            SchemaMismatch: the message is of another major version than this release writes.
            BusError: the letter could not be kept in time; the message says why and names a consumer that lags.
            UnknownPeer: the bus does not admit our key.
        """

    @abstractmethod
    def subscribe(self, *topics: str, group: str = "", since: int | None = None) -> Subscription:
        """Listen to topics; a topic matches itself and everything below it.

        Args:
            topics: at least one topic, e.g. `compilation` or `system.events.kernel_ready`.
            group: durable name that keeps its place when nobody listens; subscribers of one group share its letters.
                Empty: a subscription of its own, gone when it is closed.
            since: first offset to replay, as far as the journal still has it; `None`: a group's own place, and from
                now on where there is none.

        Raises:
            ContractError: a topic is malformed, or none is given.
            BusError: the bus did not answer in time, or is closed.
            UnknownPeer: the bus does not admit our key.
        """

    @abstractmethod
    def forget(self, group: str) -> None:
        """Remove a group and what waits for it; an unknown group is no error.

        Raises:
            BusError: the bus did not answer in time, or is closed.
        """

    @abstractmethod
    def close(self) -> None:
        """End every subscription of this bus; a second call changes nothing."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def is_journalled(topic: str) -> bool:
    """Whether letters on a topic are kept; only high-rate telemetry is not.

    Example:
        >>> is_journalled("compilation.ready"), is_journalled("telemetry.seed.health")
        (True, False)
    """
    return not matches(topic, (TELEMETRY_SEED_HEALTH,))


def matches(topic: str, patterns: tuple[str, ...]) -> bool:
    """Whether a topic is one of the patterns or below one.

    Example:
        >>> matches("compilation.ready", ("compilation",)), matches("compilations", ("compilation",))
        (True, False)
    """
    return any(topic == pattern or topic.startswith(f"{pattern}.") for pattern in patterns)
