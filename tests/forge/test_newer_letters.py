"""A letter that a later release wrote: each service of the forge passes it over, says so, and goes on behind it."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from esper.blueprints import Library, load_library
from esper.forge.field import ReportKeeper
from esper.karn.service import ANSWERED, ASKED, SUBMITTED, Karn, stated
from esper.karn.source import BlueprintSource
from esper.leyline.artifacts import BlueprintAnswer, BlueprintRequest, CompilationRequest, KernelFaulted
from esper.leyline.base import Message
from esper.leyline.codec import encode, seal
from esper.leyline.envelope import INNOVATION_FIELD_REPORTS
from esper.leyline.errors import EsperError, SchemaMismatch
from esper.leyline.events import SecurityAlert
from esper.oona.exchange import Sealed, open_letter
from esper.oona.memory import MemoryBus
from esper.tezzeret.service import REQUESTED, Tezzeret
from esper.urabrask import job
from esper.urabrask.service import FAULTED, Urabrask
from esper.urza import KeyRing, Urza
from esper.workers.in_process import InProcessPool
from tests.kernels import spec
from tests.urza.test_field import report

DESIGN = load_library()["BP-PROJ-LORA"].ir
EXAMPLES: dict[str, tuple[str, Message]] = {
    "karn": (SUBMITTED, stated(DESIGN)),
    "tezzeret": (REQUESTED, CompilationRequest(spec=spec(), pipeline="fast")),
    "urabrask": (FAULTED, KernelFaulted(kernel_artifact_id="k")),
    "field reports": (INNOVATION_FIELD_REPORTS, report()),
}


def newer(bus: MemoryBus, message: Message, topic: str) -> None:
    """Have a letter in the bus's journal whose content a later release wrote."""
    fields = message.model_dump() | {"schema_version": "2.0"}
    envelope = seal(message, topic, "later").model_copy(
        update={"payload": msgpack.packb((type(message).__name__, fields))}
    )
    with bus._changed:
        (offset,) = bus._exchange.accept([Sealed(envelope, encode(envelope))])
        bus._changed.notify_all()
    assert not isinstance(offset, EsperError)


class Services:
    """What a forge runs, each on its own, over one bus and one store."""

    def __init__(self, folder: Path) -> None:
        self.bus = MemoryBus()
        self.urza = Urza(folder / "store", KeyRing(folder / "keys"))
        self.pool = InProcessPool("urabrask", job, folder=folder / "pool", cpu_budget_s=0.0)
        self.all: dict[str, Any] = {
            "karn": Karn(self.bus, self.urza, Library([])),
            "tezzeret": Tezzeret(self.bus, self.urza, self.pool),
            "urabrask": Urabrask(self.bus, self.urza, self.pool),
            "field reports": ReportKeeper(self.bus, self.urza),
        }

    def close(self) -> None:
        for closing in (*self.all.values(), self.pool, self.urza, self.bus):
            closing.close()


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    made = Services(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_newer_letter_is_told_of_and_the_next_one_is_dealt_with(
    name: str, services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    topic, message = EXAMPLES[name]
    with services.bus.subscribe("system.events.security_alert") as alerts:
        for _ in range(2):
            newer(services.bus, message, topic)
        services.bus.publish(message, topic)
        while services.all[name].step(0.0):
            pass
        told = [alerts.receive(0.0) for _ in range(3)]
    assert caplog.text.count("2.0") >= 2
    heard = [each.message for each in told if each is not None]
    assert len(heard) == 2 and all(isinstance(each, SecurityAlert) and "2.0" in each.detail for each in heard)
    assert {each.subject.partition(" for ")[0] for each in heard if isinstance(each, SecurityAlert)} == {
        "letter 1",
        "letter 2",
    }
    # It is in the journal still, for a release that can read it.
    data = services.bus._exchange._journal.read(1)
    assert data is not None
    with pytest.raises(SchemaMismatch):
        open_letter(data)
    assert services.bus._exchange._journal.read(3) is not None


def test_the_good_letters_were_dealt_with(services: Services) -> None:
    for topic, message in EXAMPLES.values():
        newer(services.bus, message, topic)
        services.bus.publish(message, topic)
    for service in services.all.values():
        while service.step(0.0):
            pass
    assert [kept.report.seed_id for kept in services.urza.reports()] == ["a#0.0"]
    assert [blueprint.name for blueprint in services.urza.blueprints()] == [DESIGN.name]
    assert {kernel.name for kernel in services.urza.kernels()} == {"BP-MLP-GELU", DESIGN.name}


def test_an_answer_of_karn_that_cannot_be_read_is_as_good_as_none() -> None:
    with MemoryBus() as bus, bus.subscribe(ASKED) as asked:

        def reply() -> None:
            asked.receive(5.0)
            newer(bus, BlueprintAnswer(names=("BP-LATER",)), ANSWERED)

        thread = threading.Thread(target=reply)
        thread.start()
        answer = BlueprintSource(bus, load_library(), timeout_s=5.0).ask(BlueprintRequest(layout="btd"))
        thread.join(5.0)
    assert answer.conservative and "2.0" in answer.why
