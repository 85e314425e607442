"""Field reports on their way from a run into the store of its forge."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.forge.field import ReportKeeper
from esper.forge.link import ForgeLink
from esper.kasmina.fingerprint import fingerprint
from esper.kasmina.forge_store import ForgeStore
from esper.kasmina.writer import Moment
from esper.leyline.base import Message
from esper.leyline.envelope import INNOVATION_FIELD_REPORTS, Priority
from esper.leyline.errors import BusError
from esper.leyline.events import KernelReady
from esper.leyline.reports import Counterfactual, FieldReport
from esper.oona.contracts import Bus
from esper.urza.field import LARGEST
from tests.forge.test_store import Shared, World, until
from tests.tamiyo.test_controller import controlled
from tests.urza.test_field import report


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def keeper(world: World) -> Iterator[ReportKeeper]:
    made = ReportKeeper(world.bus, world.urza)
    yield made
    made.close()


def kept(world: World) -> list[FieldReport]:
    return [each.report for each in world.urza.reports()]


def test_a_report_travels_from_the_run_into_the_store(world: World, keeper: ReportKeeper) -> None:
    with world.bus.subscribe(INNOVATION_FIELD_REPORTS) as letters:
        store = world.open()
        for _ in range(2):  # a resumed run says it again
            store.report(report(counterfactual=None))
            assert keeper.step(5.0)
        assert not keeper.step(0.0)
        assert kept(world) == [report(counterfactual=None)]
        first = letters.receive(1.0)
    assert first is not None and first.envelope.trace_id and first.envelope.priority is Priority.LOW


def test_a_run_that_ends_has_told_everything(world: World, keeper: ReportKeeper) -> None:
    store = world.open()
    for number in range(20):
        store.report(report(number, counterfactual=None))
    store.close()
    while keeper.step(0.0):
        pass
    assert kept(world) == [report(number, counterfactual=None) for number in range(20)]


def test_what_could_not_be_sent_while_the_forge_started_is_sent_when_it_is_there(
    world: World, keeper: ReportKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    there = False

    def connect() -> Bus:
        if not there:
            raise BusError("it is starting")
        return Shared(world.bus)

    store = ForgeStore(ForgeLink(connect, lambda: None, fingerprint))
    world.stores.append(store)
    with caplog.at_level(logging.DEBUG):
        store.report(report(counterfactual=None))
        until(lambda: "it is starting" in caplog.text)
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    there = True
    assert keeper.step(10.0)
    assert kept(world) == [report(counterfactual=None)]


def test_a_forge_that_never_comes_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def connect() -> Bus:
        raise BusError("nobody there")

    store = ForgeStore(ForgeLink(connect, lambda: None, fingerprint, works=lambda: False))
    began = time.monotonic()
    for number in range(2000):
        store.report(report(number))
    store.close()
    assert time.monotonic() - began < 2.0
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert len(store._reports) == 1000


def test_what_cannot_be_kept_stops_nothing(world: World, keeper: ReportKeeper) -> None:
    world.bus.publish(report(1, group="x" * LARGEST), INNOVATION_FIELD_REPORTS)
    world.bus.publish(KernelReady(kernel_artifact_id="k", blueprint_id="b", pipeline="fast"), INNOVATION_FIELD_REPORTS)
    world.bus.publish(report(2, counterfactual=None), INNOVATION_FIELD_REPORTS)
    assert [keeper.step(0.2) for _ in range(4)] == [True, True, True, False]
    assert kept(world) == [report(2, counterfactual=None)]


@pytest.mark.parametrize(("gain", "end"), [(0.5, "FOSSILIZED"), (-0.5, "CULLED")])
def test_what_a_run_writes_down_is_what_its_forge_keeps(
    gain: float, end: str, world: World, keeper: ReportKeeper
) -> None:
    model, controller = controlled()
    controller.use_store(world.open())
    found = Counterfactual(mean=gain, lower=gain, upper=gain, n=8)
    controller.evidence = lambda names: dict.fromkeys(names, found)
    heard: list[Message] = []
    controller.listeners.append(heard.append)
    for step in range(1, 6):
        controller.step(controller.observe(Moment("run", 0, step), validation_loss=1.0))
        for graft in model.bank.grafted().values():
            graft.set_alpha(1.0)
    written = [message for message in heard if isinstance(message, FieldReport)]
    assert [each.outcome.value for each in written] == [end]
    assert keeper.step(5.0)
    assert kept(world) == written
