"""A checker that ships with Oona: whether a bus keeps its contract."""

import threading
from collections.abc import Callable, Iterable
from functools import partial

from esper.leyline.codec import encode
from esper.leyline.envelope import TELEMETRY_SEED_HEALTH, Priority
from esper.leyline.errors import BusError, ContractError, SchemaMismatch
from esper.leyline.events import KernelReady, SecurityAlert, SlowConsumer
from esper.oona.contracts import NO_OFFSET, Bus, BusLimits, Delivery, Subscription

_SOON_S = 10.0
_NEVER_S = 0.2
_TOPIC = "compilation.ready"


def check_bus(bus_factory: Callable[[BusLimits], Bus]) -> None:
    """Check that a bus keeps its contract.

    Every letter reaches every group once it is acknowledged and again as long as it is not; in order of arrival within
    a priority, the most urgent first; a group goes on where it stopped; a replay from any offset is the original
    stream; a consumer that lags makes publishers wait and is named, while telemetry is dropped and counted; a newer
    schema is refused and the stream goes on; what is closed says so.

    Args:
        bus_factory: returns a fresh bus with an empty journal and these limits.

    Raises:
        AssertionError: a promise is broken; the message names it.

    Example:
        >>> from esper.oona.memory import MemoryBus
        >>> check_bus(MemoryBus)
    """
    for check in (_check_stream, _check_groups, _check_redelivery, _check_sharing, _check_refusals, _check_close):
        with bus_factory(BusLimits(visibility_s=0.3)) as bus:
            check(bus)
    with bus_factory(BusLimits(capacity=4, publish_timeout_s=0.3)) as bus:
        _check_back_pressure(bus)
    with bus_factory(BusLimits(telemetry_capacity=50)) as bus:
        _check_telemetry(bus)


def _letter(number: int) -> KernelReady:
    return KernelReady(kernel_artifact_id=str(number), blueprint_id="b", pipeline="fast")


def _publish(bus: Bus, numbers: Iterable[int], priority: Priority = Priority.NORMAL) -> None:
    for number in numbers:
        bus.publish(_letter(number), _TOPIC, priority=priority)


def _receive(subscription: Subscription, count: int, ack: bool = True) -> list[Delivery]:
    found: list[Delivery] = []
    for _ in range(count):
        delivery = subscription.receive(_SOON_S)
        assert delivery is not None, f"{len(found)} letters came within {_SOON_S:g} s, {count} were published"
        found.append(delivery)
        if ack:
            subscription.ack(delivery)
    return found


def _numbers(deliveries: Iterable[Delivery]) -> list[int]:
    messages = [delivery.message for delivery in deliveries]
    return [int(message.kernel_artifact_id) for message in messages if isinstance(message, KernelReady)]


def _check_silent(subscription: Subscription, why: str) -> None:
    delivery = subscription.receive(_NEVER_S)
    assert delivery is None, f"{why}, and yet {delivery} came"


def _check_stream(bus: Bus) -> None:
    """Topics, order, what is inside an envelope, replay."""
    _publish(bus, [-1])
    with bus.subscribe("compilation") as root, bus.subscribe("validation") as other, bus.subscribe(_TOPIC) as leaf:
        sent = [bus.publish(_letter(n), _TOPIC, trace_id="t", priority=Priority.HIGH) for n in range(100)]
        found = _receive(root, 100)
        assert [d.envelope for d in found] == sent, "the letters differ from what was published, or their order does"
        assert _numbers(found) == _numbers(_receive(leaf, 100)) == list(range(100)), "a letter holds another message"
        offsets = [delivery.offset for delivery in found]
        assert offsets == sorted(set(offsets)) and offsets[0] > NO_OFFSET, f"offsets do not ascend: {offsets}"
        _check_silent(other, "nothing was published on this topic")
    for start in (0, 37, 99):
        with bus.subscribe("compilation", since=offsets[start]) as replay:
            again = _receive(replay, 100 - start)
            assert again == found[start:], f"a replay from offset {offsets[start]} differs from the original"
            _check_silent(replay, "the replay is over")


def _check_groups(bus: Bus) -> None:
    """A group keeps its place when nobody listens; the most urgent comes first."""
    bus.subscribe(_TOPIC, group="readers").close()
    _publish(bus, range(3), Priority.LOW)
    _publish(bus, range(3, 6))
    _publish(bus, [6], Priority.EMERGENCY)
    with bus.subscribe(_TOPIC, group="readers") as readers:
        assert _numbers(_receive(readers, 4)) == [6, 3, 4, 5], "priority, then order of arrival, is not kept"
    with bus.subscribe(_TOPIC, group="readers") as readers:
        rest = _receive(readers, 3)
        assert _numbers(rest) == [0, 1, 2], "the group did not go on where it stopped"
        _check_silent(readers, "the group has acknowledged everything")
    with bus.subscribe(_TOPIC, group="readers", since=rest[1].offset) as readers:
        assert sorted(_numbers(_receive(readers, 6))) == [1, 2, 3, 4, 5, 6], "the group was not taken back"
    bus.forget("readers")
    with bus.subscribe(_TOPIC, group="readers") as readers:
        _check_silent(readers, "the group was forgotten and begins anew")


def _check_redelivery(bus: Bus) -> None:
    """What is not acknowledged comes again: after the visibility time, and to the next subscriber."""
    with bus.subscribe(_TOPIC, group="readers") as readers:
        _publish(bus, range(4))
        first = _receive(readers, 4, ack=False)
        readers.ack(first[1])
        readers.ack(first[1])
        again = _receive(readers, 3, ack=False)
        assert _numbers(again) == [0, 2, 3], f"letters {_numbers(again)} came again, not the ones without an ack"
        readers.ack(again[0])
    with bus.subscribe(_TOPIC, group="readers") as readers:
        assert _numbers(_receive(readers, 2)) == [2, 3], "the next subscriber did not get what was left"


def _check_sharing(bus: Bus) -> None:
    """Subscribers of one group share its letters."""
    with bus.subscribe(_TOPIC, group="readers") as one, bus.subscribe(_TOPIC, group="readers") as two:
        _publish(bus, range(60))
        found: list[int] = []
        while len(found) < 60:
            got = [s.receive(_NEVER_S / 10) for s in (one, two)]
            for subscription, delivery in zip((one, two), got, strict=True):
                if delivery is not None:
                    subscription.ack(delivery)
                    found += _numbers([delivery])
        assert sorted(found) == list(range(60)), "a letter was lost, or two subscribers of one group got it"


def _check_refusals(bus: Bus) -> None:
    """A newer schema and malformed topics are refused; the stream goes on, and an event tells of the schema."""
    with bus.subscribe("compilation", "system.events") as subscription:
        newer = KernelReady.model_construct(**(_letter(0).model_dump() | {"schema_version": "2.0"}))
        _check_raises(SchemaMismatch, lambda: bus.publish(newer, _TOPIC))
        alert = _receive(subscription, 1)[0].message
        assert isinstance(alert, SecurityAlert) and "2.0" in alert.detail, f"no alert tells of the schema: {alert}"
        for topic in ("", "UPPER", "a..b", "a b"):
            _check_raises(ContractError, partial(bus.publish, _letter(0), topic))
            _check_raises(ContractError, partial(bus.subscribe, topic))
        _check_raises(ContractError, bus.subscribe)
        _check_raises(ContractError, lambda: bus.subscribe("a", group="two words"))
        _publish(bus, [1])
        assert _numbers(_receive(subscription, 1)) == [1], "the stream stopped at a refusal"


def _check_back_pressure(bus: Bus) -> None:
    """A full consumer makes publishers wait; it is named, and nothing that was accepted is lost."""
    readers = bus.subscribe(_TOPIC, group="snail")
    with bus.subscribe("system.events.slow_consumer") as alerts:
        _publish(bus, range(4))
        error = _check_raises(BusError, lambda: _publish(bus, [4]))
        assert "snail" in str(error), f"the error does not name the consumer: {error}"
        bus.publish(_letter(0), "validation.characterized")
        found = [delivery.message for delivery in _receive(alerts, 2)]
        queued = [alert.queued for alert in found if isinstance(alert, SlowConsumer) and alert.consumer == "snail"]
        assert queued == [2, 4], f"alerts should tell of 2 and of 4 letters, not {queued}"
    timer = threading.Timer(0.1, lambda: _receive(readers, 2))
    timer.start()
    _publish(bus, [5])
    timer.join()
    assert _numbers(_receive(readers, 3)) == [2, 3, 5], "letters were lost while the consumer was full"
    readers.close()


def _check_telemetry(bus: Bus) -> None:
    """Telemetry is never kept and never waits; the oldest is dropped, and an alert counts it."""
    with (
        bus.subscribe(TELEMETRY_SEED_HEALTH) as subscription,
        bus.subscribe("system.events.slow_consumer", group="watch") as alerts,
    ):
        for number in range(500):
            bus.publish(_letter(number), TELEMETRY_SEED_HEALTH)
        alert = _receive(alerts, 1)[0].message
        assert isinstance(alert, SlowConsumer) and alert.dropped > 0, f"no alert counts the lost telemetry: {alert}"
        found = []
        while (delivery := subscription.receive(_NEVER_S)) is not None:
            subscription.ack(delivery)
            found.append(delivery)
        numbers = _numbers(found)
        assert numbers == sorted(set(numbers)) and numbers[-1] == 499, f"the newest should stay, in order: {numbers}"
        assert len(numbers) < 500 and all(d.offset == NO_OFFSET for d in found), "nothing was dropped, or it was kept"
    with bus.subscribe(TELEMETRY_SEED_HEALTH, since=0) as replay:
        _check_silent(replay, "telemetry is not journalled")


def _check_close(bus: Bus) -> None:
    """What is closed says so; closing twice changes nothing."""
    subscription, other = bus.subscribe(_TOPIC), bus.subscribe(_TOPIC)
    subscription.close()
    subscription.close()
    _check_raises(BusError, lambda: subscription.receive(_NEVER_S))
    _publish(bus, [1])
    assert encode(_receive(other, 1)[0].message) == encode(_letter(1)), "another subscription was closed with it"
    bus.close()
    bus.close()
    for call in (lambda: _publish(bus, [2]), lambda: bus.subscribe(_TOPIC), lambda: other.receive(_NEVER_S)):
        _check_raises(BusError, call)


def _check_raises(kind: type[Exception], call: Callable[[], object]) -> Exception:
    try:
        result = call()
    except kind as error:
        assert str(error), f"{kind.__name__} says nothing"
        return error
    raise AssertionError(f"{kind.__name__} should have been raised; {result!r} came back")
