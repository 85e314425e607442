"""Karn as a service: takes blueprints in, asks for their kernels, answers, and is done without when he is silent."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.blueprints import Library, load_library
from esper.karn.service import ASKED, REFUSED, SUBMITTED, Karn, reference, stated
from esper.karn.source import BlueprintSource
from esper.leyline.artifacts import BlueprintAnswer, BlueprintRequest, CompilationRequest
from esper.leyline.envelope import Priority
from esper.leyline.errors import BlueprintError
from esper.leyline.events import BlueprintSubmitted
from esper.leyline.kernels import ArtifactStatus
from esper.oona.contracts import Bus, Subscription
from esper.oona.memory import MemoryBus
from esper.urza.signing import KeyRing
from esper.urza.store import Urza

LIBRARY = load_library()
SMALL = Library([LIBRARY["BP-MLP-GELU"], LIBRARY["BP-CONV-RES"]])


@pytest.fixture
def bus() -> Iterator[Bus]:
    with MemoryBus() as made:
        yield made


@pytest.fixture
def urza(tmp_path: Path) -> Iterator[Urza]:
    with Urza(tmp_path / "store", KeyRing(tmp_path / "keys")) as made:
        yield made


def heard(subscription: Subscription) -> list[object]:
    found = []
    while (delivery := subscription.receive(0.05)) is not None:
        subscription.ack(delivery)
        found.append((delivery.message, delivery.envelope.trace_id))
    return found


def test_the_library_is_submitted_once(bus: Bus, urza: Urza) -> None:
    with bus.subscribe("compilation.requested") as requests, bus.subscribe("system.events") as events:
        assert Karn(bus, urza, SMALL).open() == 2
        assert {type(message) for message, _ in heard(requests)} == {CompilationRequest}
        assert {message.name for message, _ in heard(events)} == {"BP-MLP-GELU", "BP-CONV-RES"}
        assert Karn(bus, urza, SMALL).open() == 0
        assert not heard(requests)
    assert {blueprint.status for blueprint in urza.blueprints()} == {ArtifactStatus.UNVALIDATED}


def test_what_is_handed_in_goes_before_the_library(bus: Bus, urza: Urza) -> None:
    with bus.subscribe("compilation.requested") as requests:
        karn = Karn(bus, urza, SMALL)
        karn.open()
        bus.publish(stated(LIBRARY["BP-PROJ-LORA"].ir), SUBMITTED)
        assert karn.step(0.0)
        letters = [requests.receive(0.0) for _ in range(3)]
    assert [letter.envelope.priority for letter in letters if letter] == [Priority.NORMAL, Priority.LOW, Priority.LOW]


def test_a_blueprint_of_the_library_that_is_refused_does_not_stop_the_others(bus: Bus, urza: Urza) -> None:
    taken = stated(LIBRARY["BP-PROJ-LORA"].ir).model_copy(update={"name": "BP-MLP-GELU"})
    urza.submit(taken)
    assert Karn(bus, urza, SMALL).open() == 2
    assert {blueprint.name for blueprint in urza.blueprints()} == {"BP-MLP-GELU", "BP-CONV-RES"}


def test_a_submitted_blueprint_is_taken_in_under_its_own_trace(bus: Bus, urza: Urza) -> None:
    karn = Karn(bus, urza, SMALL)
    with bus.subscribe("compilation.requested") as requests, bus.subscribe("system.events") as events:
        bus.publish(stated(LIBRARY["BP-PROJ-LORA"].ir), SUBMITTED, trace_id="mine")
        assert karn.step(0.1)
        [(asked, trace)] = heard(requests)
        assert isinstance(asked, CompilationRequest) and asked.pipeline == "fast" and trace == "mine"
        [(told, trace)] = heard(events)
        assert isinstance(told, BlueprintSubmitted) and trace == "mine"


@pytest.mark.parametrize("text", ["{", "[1]", '{"name": "BP-X"}', "[" * 5000])
def test_what_is_no_blueprint_is_refused_and_does_not_stop_him(bus: Bus, urza: Urza, text: str) -> None:
    karn = Karn(bus, urza, SMALL)
    broken = stated(LIBRARY["BP-PROJ-LORA"].ir).model_copy(update={"ir": text})
    with bus.subscribe(REFUSED) as refusals:
        bus.publish(broken, SUBMITTED, trace_id="mine")
        assert karn.step(0.1)
        [(refusal, trace)] = heard(refusals)
    assert isinstance(refusal, BlueprintAnswer) and refusal.why and trace == "mine"
    bus.publish(BlueprintRequest(), ASKED)
    assert karn.step(0.1)


@pytest.mark.parametrize("known", LIBRARY, ids=lambda known: known.ir.name)
def test_every_blueprint_has_a_reference_kernel(known: object) -> None:
    assert reference(stated(known.ir).ir).d_in == 64  # type: ignore[attr-defined]


def test_a_reference_of_nonsense_is_refused() -> None:
    with pytest.raises(BlueprintError, match="not JSON"):
        reference("{")


def test_he_answers_and_when_he_is_silent_the_answer_is_conservative(bus: Bus, urza: Urza) -> None:
    source = BlueprintSource(bus, LIBRARY, timeout_s=0.3, rest_s=60.0)
    karn, stop = Karn(bus, urza, LIBRARY), threading.Event()

    def serve() -> None:
        while not stop.is_set():
            karn.step(0.05)

    thread = threading.Thread(target=serve)
    thread.start()
    answer = source.ask(BlueprintRequest(layout="btd"))
    stop.set()
    thread.join(5.0)
    assert answer.names and not answer.conservative
    silent = [source.ask(BlueprintRequest(layout="btd")) for _ in range(3)]
    assert all(each.conservative and "did not answer" in each.why for each in silent[:2])
    began = time.monotonic()
    assert source.ask(BlueprintRequest(layout="btd")).conservative
    assert time.monotonic() - began < 0.2, "an open circuit must not wait"
