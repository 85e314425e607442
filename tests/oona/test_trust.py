"""Who may talk to the bus, and what it does with what it cannot read."""

import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.leyline import (
    TELEMETRY_SEED_HEALTH,
    BusError,
    ConfigError,
    ContractError,
    OutputError,
    Priority,
    SchemaMismatch,
    SecurityAlert,
    TrustError,
    UnknownPeer,
    Violation,
    encode,
    seal,
)
from esper.oona import Bus, BusLimits, CurveKeys, Subscription, ZmqBus, admit, admitted, wire
from esper.oona.broker import Broker
from esper.oona.gate import check_address, is_local
from esper.oona.journal import Journal
from tests.oona.children import TOPIC, letter, number_of

CASES = int(os.environ.get("ESPER_SOAK", "3")) * 40
QUICK = BusLimits(publish_timeout_s=2.0)
LOCAL = "tcp://127.0.0.1:*"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="oona") as name:
        yield Path(name)


@pytest.fixture
def broker(folder: Path) -> Iterator[Broker]:
    with Broker(folder) as running:
        yield running


def alert_of(subscription: Subscription) -> SecurityAlert:
    delivery = subscription.receive(5.0)
    assert delivery is not None, "no alert came"
    subscription.ack(delivery)
    assert isinstance(delivery.message, SecurityAlert)
    return delivery.message


# --- keys -----------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_and_told_of_until_it_is_admitted(folder: Path) -> None:
    server, friend, stranger = (CurveKeys.generate() for _ in range(3))
    admit(folder / "admitted", "friend", friend.public)
    with (
        Broker(folder, LOCAL, server.admitting(folder / "admitted")) as broker,
        ZmqBus(broker.address, "friend", friend.for_server(server.public), limits=QUICK) as bus,
        bus.subscribe("system.events.security_alert") as alerts,
        ZmqBus(broker.address, "stranger", stranger.for_server(server.public), limits=QUICK) as other,
    ):
        with pytest.raises(UnknownPeer, match="does not admit our key"):
            other.publish(letter(1), TOPIC)
        with pytest.raises(UnknownPeer):
            other.subscribe(TOPIC)
        with pytest.raises(UnknownPeer):
            other.publish(letter(1), TELEMETRY_SEED_HEALTH)
        alert = alert_of(alerts)
        assert (alert.subject, alert.violation) == (stranger.public, Violation.PERMISSION)
        admit(folder / "admitted", "stranger", stranger.public)
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            try:
                other.publish(letter(1), TOPIC)
                break
            except UnknownPeer:
                time.sleep(0.05)
        else:
            pytest.fail("the key was admitted and is refused all the same")


def test_without_keys_nobody_gets_in(folder: Path) -> None:
    server = CurveKeys.generate()
    limits = BusLimits(publish_timeout_s=0.5)
    with (
        Broker(folder, LOCAL, server.admitting(folder / "admitted")) as broker,
        ZmqBus(broker.address, "naked", limits=limits) as bus,
        pytest.raises(BusError),
    ):
        bus.publish(letter(1), TOPIC)


def test_other_machines_need_keys(folder: Path) -> None:
    for address in ("tcp://*:7000", "tcp://0.0.0.0:7000", "tcp://10.0.0.1:7000", "tcp://127.0.0.1.example.com:1"):
        assert not is_local(address)
        with pytest.raises(ConfigError, match="give the broker keys"):
            Broker(folder, address)
    for address in ("ipc:///tmp/a", LOCAL, "tcp://localhost:7000", "tcp://[::1]:7000", "tcp://127.1.2.3:7000"):
        check_address(address, None)
    with pytest.raises(ConfigError, match="folder of admitted"):
        Broker(folder, LOCAL, CurveKeys.generate())
    assert not (folder / "journal.sqlite").exists()


def test_a_secret_key_is_for_its_owner(folder: Path) -> None:
    keys = CurveKeys.generate()
    path = keys.save(folder / "keys" / "me")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert CurveKeys.load(path) == keys
    assert keys.secret not in repr(keys)
    assert admitted(path.parent) == {keys.public: "me"}
    with pytest.raises(OutputError, match="overwritten"):
        CurveKeys.generate().save(path)
    path.chmod(0o640)
    with pytest.raises(TrustError, match="chmod 600"):
        CurveKeys.load(path)
    path.chmod(0o600)
    for text in ("", f"{keys.public}\n{CurveKeys.generate().secret}\n", "one two three"):
        path.write_text(text)
        with pytest.raises(TrustError, match="key pair"):
            CurveKeys.load(path)
    with pytest.raises(TrustError, match="cannot be read"):
        CurveKeys.load(folder / "missing")
    for name in ("", "../up", "a/b", ".hidden"):
        with pytest.raises(ConfigError, match="not a name"):
            admit(folder, name, keys.public)


# --- frames ---------------------------------------------------------------------------------------------------------


def newer(number: int, version: str = "2.0") -> bytes:
    """An envelope whose payload a later release wrote."""
    fields = letter(number).model_dump() | {"schema_version": version}
    envelope = seal(letter(number), TOPIC, "later", priority=Priority.NORMAL)
    return encode(envelope.model_copy(update={"payload": msgpack.packb(("KernelReady", fields))}))


@pytest.fixture
def raw(broker: Broker) -> Iterator["zmq.Socket[bytes]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.rcvtimeo = 5_000
    dealer.connect(broker.address)
    yield dealer
    context.destroy(linger=0)


def answer(raw: "zmq.Socket[bytes]", *frames: bytes) -> bytes:
    raw.send_multipart(frames)
    return raw.recv_multipart()[1]


frames = st.lists(
    st.one_of(
        st.sampled_from([wire.VERSION, wire.PUBLISH, wire.TELEMETRY, wire.SUBSCRIBE, wire.PULL, wire.ACK, wire.LEAVE]),
        st.binary(max_size=60),
        st.dictionaries(
            st.sampled_from(["name", "topics", "group", "since", "resume", "room", "held", "offsets"]),
            st.one_of(st.integers(-(2**63), 2**64 - 1), st.text(max_size=5), st.lists(st.integers(-9, 2**64 - 1))),
        ).map(msgpack.packb),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=CASES, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(frames=frames, fix=st.booleans())
def test_no_frame_stops_the_broker(broker: Broker, raw: "zmq.Socket[bytes]", frames: list[bytes], fix: bool) -> None:
    if fix:
        frames = [wire.VERSION, (frames * 3)[0], b"n", (frames * 3)[2]]
    raw.send_multipart(frames)
    number = os.urandom(8)
    raw.send_multipart([wire.VERSION, wire.FORGET, number, wire.pack(group="nobody")])
    while (reply := raw.recv_multipart())[2] != number:
        assert reply[0] == wire.VERSION
    assert reply[1] == wire.DONE


def test_bad_letters_are_refused_and_the_rest_goes_on(broker: Broker, raw: "zmq.Socket[bytes]") -> None:
    with ZmqBus(broker.address, "me") as bus, bus.subscribe("compilation", "system.events") as subscription:
        good = encode(seal(letter(1), TOPIC, "raw"))
        assert answer(raw, wire.VERSION, wire.PUBLISH, b"1", good[:-3]) == wire.REFUSED
        assert "refused" in alert_of(subscription).detail
        envelope = encode(seal(letter(1), TOPIC, "raw").model_copy(update={"schema_version": "2.0"}))
        for bad in (b"", newer(1), envelope, encode(seal(letter(1), TELEMETRY_SEED_HEALTH, "raw"))):
            assert answer(raw, wire.VERSION, wire.PUBLISH, b"2", bad) == wire.REFUSED
        raw.send_multipart([wire.VERSION, wire.TELEMETRY, b"", good])
        assert answer(raw, b"oona/9", wire.PUBLISH, b"3", good) == wire.REFUSED
        assert answer(raw, wire.VERSION, b"explode", b"4", good) == wire.REFUSED
        assert answer(raw, wire.VERSION, wire.PUBLISH, b"5", good) == wire.DONE
        delivery = subscription.receive(5.0)
        assert delivery is not None and number_of(delivery.message) == 1


@pytest.mark.slow
def test_an_oversized_frame_cuts_off_its_sender_alone(broker: Broker, raw: "zmq.Socket[bytes]") -> None:
    with ZmqBus(broker.address, "me") as bus:
        raw.send_multipart([wire.VERSION, wire.PUBLISH, b"1", bytes(wire.MAX_FRAME_BYTES + 1)])
        raw.rcvtimeo = 500
        with pytest.raises(zmq.Again):
            raw.recv_multipart()
        bus.publish(letter(1), TOPIC)
        with pytest.raises(ContractError, match="too long"):
            bus.publish(letter(1).model_copy(update={"pipeline": "x" * 2**26}), TOPIC)


@pytest.mark.parametrize("version", ["2.0", "broken"])
def test_a_newer_letter_is_refused_on_receipt_and_the_stream_goes_on(folder: Path, version: str) -> None:
    journal = Journal(folder / "journal.sqlite")
    with journal.transaction():
        journal.append("one", TOPIC, Priority.NORMAL, newer(1, version), [])
        journal.append("two", TOPIC, Priority.NORMAL, encode(seal(letter(2), TOPIC, "me")), [])
    journal.close()
    expected = SchemaMismatch if version == "2.0" else ContractError
    with Broker(folder) as broker, ZmqBus(broker.address, "me") as bus:
        _check_goes_on(bus, expected)
    journal = Journal(folder / "journal.sqlite")
    assert journal.place("readers") == 2, "the letter that cannot be read would come for ever"
    journal.close()


def _check_goes_on(bus: Bus, expected: type[ContractError]) -> None:
    with bus.subscribe("compilation", group="readers", since=1) as readers, bus.subscribe("system.events") as alerts:
        with pytest.raises(expected):
            readers.receive(5.0)
        delivery = readers.receive(5.0)
        assert delivery is not None and number_of(delivery.message) == 2
        assert "version" in alert_of(alerts).detail
        assert readers.receive(0.1) is None


def test_a_journal_of_another_version_or_no_journal_is_refused(folder: Path) -> None:
    path = folder / "journal.sqlite"
    path.write_bytes(b"This is no database, whatever its name says. " * 100)
    with pytest.raises(BusError, match="cannot be opened"):
        Broker(folder)
    path.unlink()
    journal = Journal(path)
    with pytest.raises(BusError, match="another process may have it open"):
        Journal(path)
    journal._db.execute("PRAGMA user_version = 7")
    journal.close()
    with pytest.raises(BusError, match="version 7"):
        Broker(folder)


def test_addresses_that_cannot_be(folder: Path, broker: Broker) -> None:
    for listen in ("tcp://127.0.0.1:no", f"ipc://{folder}/{'x' * 120}", "nonsense"):
        with pytest.raises((BusError, ConfigError)):
            Broker(folder / "other", listen)
    with pytest.raises(BusError, match="not an address"):
        ZmqBus("nonsense", "me")
