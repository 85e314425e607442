"""A client outlives its broker, and the most urgent letter overtakes what the client already holds."""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.leyline import TELEMETRY_SEED_HEALTH, BusError, Priority
from esper.oona import BusLimits, MemoryBus, Subscription, ZmqBus
from esper.oona.broker import Broker
from tests.oona.children import GROUP, TOPIC, letter, number_of, wait_for


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="oona") as name:
        yield Path(name)


def received(subscription: Subscription, count: int, ack: bool = True) -> list[int]:
    found = []
    while len(found) < count and (delivery := subscription.receive(10.0)) is not None:
        found.append(number_of(delivery.message))
        if ack:
            subscription.ack(delivery)
    return found


def test_an_emergency_overtakes_a_full_window(folder: Path) -> None:
    with Broker(folder) as broker, ZmqBus(broker.address, "me") as bus, bus.subscribe(TOPIC) as subscription:
        for number in range(100):
            bus.publish(letter(number), TOPIC)
        bus.publish(letter(-1), TOPIC, priority=Priority.EMERGENCY)
        assert wait_for(lambda: subscription._queue.urgency == Priority.EMERGENCY)  # type: ignore[attr-defined]
        assert 32 < len(subscription._queue) < 101  # type: ignore[attr-defined]
        assert received(subscription, 101) == [-1, *range(100)]


def test_the_threads_of_a_process_share_a_bus(folder: Path) -> None:
    with Broker(folder) as broker, ZmqBus(broker.address, "me") as bus, bus.subscribe(TOPIC) as subscription:

        def publish(first: int) -> None:
            for number in range(first, first + 50):
                bus.publish(letter(number), TOPIC)

        threads = [threading.Thread(target=publish, args=(1_000 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        found = received(subscription, 200)
        for thread in threads:
            thread.join()
        for n in range(4):
            assert [number for number in found if number // 1_000 == n] == list(range(1_000 * n, 1_000 * n + 50))


def test_a_broker_goes_and_comes_back(folder: Path) -> None:
    broker = Broker(folder)
    with ZmqBus(broker.address, "me") as bus:
        with bus.subscribe(TOPIC, group=GROUP) as readers, bus.subscribe(TOPIC) as nameless:
            for number in range(4):
                bus.publish(letter(number), TOPIC)
            deliveries = [readers.receive(5.0) for _ in range(4)]
            for delivery in deliveries[:2]:
                assert delivery is not None
                readers.ack(delivery)
            assert wait_for(lambda: not readers._done)  # type: ignore[attr-defined]
            broker.close()
            thread = threading.Thread(target=bus.publish, args=(letter(4), TOPIC))
            thread.start()
            time.sleep(0.3)
            assert thread.is_alive(), "a letter was confirmed without a broker"
            broker = Broker(folder)
            thread.join(10.0)
            assert not thread.is_alive()
            assert received(readers, 3) == [2, 3, 4], "what was not acknowledged, and what waited to be sent"
            assert received(nameless, 5) == list(range(5)), "a subscription without a group was lost"
            assert readers.receive(0.1) is None
        broker.close()


def test_a_subscriber_that_was_given_up_goes_on_where_it_was(folder: Path) -> None:
    """The broker forgets the subscription several times, as it hears of it once a second only."""
    with (
        Broker(folder, limits=BusLimits(silence_s=0.3)) as broker,
        ZmqBus(broker.address, "me") as bus,
        bus.subscribe(TOPIC) as subscription,
    ):
        for number in range(60):
            bus.publish(letter(number), TOPIC)
            time.sleep(0.03)
        assert received(subscription, 60) == list(range(60))


def test_telemetry_never_waits_for_a_broker(folder: Path) -> None:
    broker = Broker(folder)
    limits = BusLimits(telemetry_capacity=10, publish_timeout_s=0.2)
    with ZmqBus(broker.address, "me", limits=limits) as bus:
        subscription = bus.subscribe(TELEMETRY_SEED_HEALTH)
        broker.close()
        with pytest.raises(BusError, match="gave no answer in 0.2 s"):
            bus.publish(letter(0), TOPIC)
        start = time.monotonic()
        for number in range(100):
            bus.publish(letter(number), TELEMETRY_SEED_HEALTH)
        assert time.monotonic() - start < 1.0
        assert bus.dropped == 90
        with Broker(folder):
            assert received(subscription, 10) == list(range(90, 100))
            subscription.close()


def test_a_trace_id_and_a_sender_travel_along(folder: Path) -> None:
    with Broker(folder) as broker, ZmqBus(broker.address, "kasmina") as bus:
        sent = bus.publish(letter(1), TOPIC, trace_id="t", priority=Priority.HIGH)
        with bus.subscribe(TOPIC, since=1) as subscription:
            delivery = subscription.receive(5.0)
        assert delivery is not None and delivery.envelope == sent
        assert (sent.sender, sent.trace_id, sent.priority) == ("kasmina", "t", Priority.HIGH)


def test_threads_wait_for_each_other_in_memory() -> None:
    """A receiver that waits is woken by a publisher, and by the end of the bus."""
    bus = MemoryBus()
    subscription, found = bus.subscribe(TOPIC), []

    def listen() -> None:
        found.append(subscription.receive(10.0))
        with pytest.raises(BusError):
            subscription.receive(10.0)
        found.append(None)

    thread = threading.Thread(target=listen)
    thread.start()
    bus.publish(letter(1), TOPIC)
    assert wait_for(lambda: len(found) == 1)
    bus.close()
    thread.join(5.0)
    assert len(found) == 2


def test_the_bus_needs_no_torch() -> None:
    code = "import sys, esper.oona, esper.oona.broker, esper.oona.checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
