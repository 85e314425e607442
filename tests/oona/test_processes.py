"""Real processes that are killed, stopped and starved: what the bus has confirmed is never lost, and nobody hangs."""

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.leyline import TELEMETRY_SEED_HEALTH, BusError
from esper.oona import BusLimits, ZmqBus
from esper.oona.journal import Journal
from tests.oona.children import GROUP, TOPIC, BrokerProcess, ConsumerProcess, letter, number_of, numbers, wait_for

pytestmark = pytest.mark.slow
ROUNDS = int(os.environ.get("ESPER_SOAK", "3"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: the name of a socket has room for about a hundred characters."""
    with tempfile.TemporaryDirectory(prefix="oona") as name:
        yield Path(name)


class Publisher:
    """Publishes one number after the other in a thread, and notes which ones were confirmed."""

    def __init__(self, address: str, pause_s: float = 0.002, timeout_s: float = 20.0) -> None:
        self.bus = ZmqBus(address, "publisher", limits=BusLimits(publish_timeout_s=timeout_s))
        self.confirmed: list[int] = []
        self.errors: list[BusError] = []
        self._pause_s, self._stop = pause_s, threading.Event()
        self.bus.subscribe("compilation", group=GROUP).close()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(self._pause_s):
            number += 1
            try:
                self.bus.publish(letter(number), TOPIC)
            except BusError as error:
                self.errors.append(error)
            else:
                self.confirmed.append(number)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.bus.close()


def test_a_broker_is_killed_again_and_again(folder: Path) -> None:
    chance, record = random.Random(0), folder / "record"
    broker = BrokerProcess(folder)
    try:
        with ConsumerProcess(broker.address, record), Publisher(broker.address) as publisher:
            for _ in range(ROUNDS):
                seen = len(publisher.confirmed)
                assert wait_for(lambda seen=seen: len(publisher.confirmed) > seen + 20), "publishing does not go on"
                time.sleep(chance.uniform(0.0, 0.1))
                broker.kill()
                time.sleep(chance.uniform(0.0, 0.1))
                broker = BrokerProcess(folder)
            publisher.stop()
            assert not publisher.errors
            assert wait_for(lambda: set(numbers(record)) >= set(publisher.confirmed)), "a confirmed letter was lost"
            assert wait_for(lambda: _unacknowledged(publisher.bus) == []), "an acknowledgement was lost"
    finally:
        broker.kill()
    journal = Journal(folder / "journal.sqlite")
    assert len(list(journal.replay())) == len(publisher.confirmed), "a letter was lost, or kept twice"
    assert journal.pending(GROUP) == []
    journal.close()


def _unacknowledged(bus: ZmqBus) -> list[int]:
    """Join the group for a moment: what comes was not acknowledged (the consumer may hold it just now)."""
    with bus.subscribe("compilation", group=GROUP) as subscription:
        delivery = subscription.receive(0.3)
        return [] if delivery is None else [delivery.offset]


def test_a_consumer_is_killed_again_and_again(folder: Path) -> None:
    chance, record = random.Random(1), folder / "record"
    with BrokerProcess(folder) as broker, Publisher(broker.address) as publisher:
        for _ in range(ROUNDS):
            before = len(numbers(record))
            with ConsumerProcess(broker.address, record):
                assert wait_for(lambda before=before: len(numbers(record)) > before + 5), "the group does not go on"
                time.sleep(chance.uniform(0.0, 0.1))
        publisher.stop()
        with ConsumerProcess(broker.address, record):
            assert wait_for(lambda: set(numbers(record)) >= set(publisher.confirmed)), "a letter was lost"
        assert not publisher.errors


def test_a_stopped_consumer_stops_nobody(folder: Path) -> None:
    record = folder / "record"
    with (
        BrokerProcess(folder) as broker,
        ConsumerProcess(broker.address, record) as consumer,
        ZmqBus(broker.address, "other") as bus,
        bus.subscribe("compilation") as other,
    ):
        bus.publish(letter(0), TOPIC)
        assert wait_for(lambda: numbers(record) == [0])
        consumer.signal(signal.SIGSTOP)
        start = time.monotonic()
        for number in range(1, 500):
            bus.publish(letter(number), TOPIC)
        found = []
        while len(found) < 500 and (delivery := other.receive(5.0)) is not None:
            found.append(number_of(delivery.message))
            other.ack(delivery)
        assert found == list(range(500))
        assert time.monotonic() - start < 10.0
        consumer.signal(signal.SIGCONT)
        assert wait_for(lambda: set(numbers(record)) == set(range(500)), 60.0)


def test_a_full_disk_is_an_error_and_no_end(folder: Path) -> None:
    """The journal may grow no longer, by a limit on the size of the broker's files; then it may again."""
    if not hasattr(resource, "prlimit"):
        pytest.skip("the limits of another process can be set on Linux only")
    with BrokerProcess(folder) as broker:

        def limit(size: int) -> None:
            resource.prlimit(broker.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        _fill(broker.address, lambda: limit(64 * 2**10), lambda: limit(resource.RLIM_INFINITY))


def test_a_full_file_system_is_an_error_and_no_end(folder: Path) -> None:
    small, filler = folder / "small", folder / "small" / "filler"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    try:
        with BrokerProcess(small / "bus", f"ipc://{folder}/socket") as broker:

            def fill() -> None:
                with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                    while True:
                        file.write(bytes(2**12))

            _fill(broker.address, fill, filler.unlink)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def _fill(address: str, fill: object, clear: object) -> None:
    """Publish before, on and after a full disk; what was confirmed comes, and nothing else."""
    assert callable(fill) and callable(clear)
    with ZmqBus(address, "me", limits=BusLimits(publish_timeout_s=5.0)) as bus:
        subscription = bus.subscribe("compilation", group=GROUP)
        with Publisher(address, pause_s=0.0, timeout_s=5.0) as publisher:
            assert wait_for(lambda: len(publisher.confirmed) > 50)
            fill()
            assert wait_for(lambda: len(publisher.errors) > 5), "a full disk is no error"
            assert "cannot be written" in str(publisher.errors[0])
            bus.publish(letter(0), TELEMETRY_SEED_HEALTH)
            clear()
            after = len(publisher.confirmed)
            assert wait_for(lambda: len(publisher.confirmed) > after + 50), "the bus did not recover"
        found: set[int] = set()
        while not found >= set(publisher.confirmed):
            delivery = subscription.receive(10.0)
            assert delivery is not None, "a confirmed letter was lost"
            found.add(number_of(delivery.message))
            subscription.ack(delivery)
        assert found == set(publisher.confirmed), "a letter was refused and came all the same"
        subscription.close()


def test_a_second_broker_does_not_get_the_folder(folder: Path) -> None:
    with BrokerProcess(folder) as broker:
        command = [sys.executable, "-m", "esper.oona.broker", "--folder", str(folder)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert second.returncode == 2
        assert "another process may have it open" in second.stderr
        with ZmqBus(broker.address, "me") as bus:
            bus.publish(letter(1), TOPIC)


def test_a_broker_that_is_asked_to_stop_leaves_no_socket(folder: Path) -> None:
    with BrokerProcess(folder) as broker:
        broker.signal(signal.SIGTERM)
        assert broker.process.wait(10) == 0
    assert not (folder / "bus").exists()
    with (
        ZmqBus(broker.address, "me", limits=BusLimits(publish_timeout_s=0.2)) as bus,
        pytest.raises(BusError, match="is its broker running"),
    ):
        bus.publish(letter(1), TOPIC)
