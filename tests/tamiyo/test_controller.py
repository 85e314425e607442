"""The controller without Lightning."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

import esper
from esper.kasmina.library_store import LibraryKernelStore
from esper.kasmina.writer import Moment
from esper.leyline.base import Message
from esper.leyline.codec import decode, encode
from esper.leyline.errors import StateCorruption
from esper.leyline.events import DecisionMade, SeedTransitioned
from esper.leyline.ids import SeedId
from esper.leyline.packets import SystemStatePacket
from esper.leyline.reports import Counterfactual
from esper.tamiyo.journal import Journal


def controlled(**settings: object) -> tuple[esper.MorphableModel, esper.TamiyoController]:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), {"stabilization_steps": 0})
    model(torch.randn(4, 8)).sum().backward()
    given = {"policy": "schedule", "schedule": ({"at": 1, "blueprint": "BP-MLP-GELU", "params": 300},), "budget": 500}
    return model, esper.TamiyoController(model, given | settings)


def walk(model: esper.MorphableModel, controller: esper.TamiyoController, gain: float) -> list[Message]:
    """Drive a whole life cycle by hand, with evidence that says `gain`."""
    found = Counterfactual(mean=gain, lower=gain, upper=gain, n=8)
    controller.evidence = lambda names: dict.fromkeys(names, found)
    heard: list[Message] = []
    controller.listeners.append(heard.append)
    controller.prepare(Moment("run", 0, 1))
    controller.store.close()  # waits for what was foreseen
    for step in range(1, 6):
        controller.step(controller.observe(Moment("run", 0, step), validation_loss=1.0))
        for graft in model.bank.grafted().values():
            graft.set_alpha(1.0)
    return heard


@pytest.mark.parametrize(("gain", "end"), [(0.5, "FOSSILIZED"), (-0.5, "CULLED")])
def test_a_life_cycle_ends_by_its_evidence(gain: float, end: str) -> None:
    model, controller = controlled()
    heard = walk(model, controller, gain)
    assert [v.state.value for v in model.seeds if v.blueprint] == [end]
    assert [r.outcome.value for r in controller.reports] == [end]
    assert sum(isinstance(m, SeedTransitioned) for m in heard) == (8 if end == "FOSSILIZED" else 7)
    assert sum(isinstance(m, DecisionMade) for m in heard) >= 2
    controller.close()


def test_the_signal_says_when_the_optimizer_must_change() -> None:
    model, controller = controlled()
    controller.prepare(Moment("run", 0, 0))
    controller.store.close()
    quiet, none = controller.step(controller.observe(Moment("run", 0, 0)))
    grown, commands = controller.step(controller.observe(Moment("run", 0, 1)))
    assert (quiet.optimizer_rebuild_required, none) == (False, [])
    assert grown.optimizer_rebuild_required
    assert [c.command.value for c in commands] == ["GERMINATE", "LOAD", "TRAIN", "GRAFT"]
    controller.close()


def by_hand(policy: str = "off", **settings: object) -> tuple[esper.MorphableModel, esper.TamiyoController]:
    return controlled(policy=policy, schedule=(), **settings)


def test_a_graft_asked_for_by_hand_keeps_the_budget() -> None:
    model, controller = by_hand(budget=200, proxy=1)
    model.request_germination("0#0.0", "BP-MLP-GELU", "fixed_ramp")
    controller.step(controller.observe(Moment("run", 0, 1)))
    assert 0 < model.bank.added_parameters() <= 200
    controller.close()


def test_a_request_that_does_not_fit_the_budget_is_explained() -> None:
    model, controller = by_hand(budget=10)
    model.request_germination("0#0.0", "BP-MLP-GELU", "fixed_ramp")
    controller.step(controller.observe(Moment("run", 0, 1)))
    assert "does not fit 0#0.0 within the 10 parameters left" in controller.explanations[-1]
    controller.close()


def test_a_request_waits_while_growth_is_paused() -> None:
    model, controller = by_hand()
    controller.pause()
    model.request_germination("0#0.0", "BP-MLP-GELU", "fixed_ramp")
    assert controller.step(controller.observe(Moment("run", 0, 1)))[1] == []
    controller.resume()
    assert controller.step(controller.observe(Moment("run", 0, 2)))[1]
    controller.close()


def test_a_seed_whose_training_is_complete_can_still_be_cancelled() -> None:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), {"training_steps": 5})
    model(torch.randn(4, 8)).sum().backward()
    controller = esper.TamiyoController(model, {"policy": "off", "budget": 500})
    model.request_germination("0#0.0", "BP-MLP-GELU", "fixed_ramp")
    controller.step(controller.observe(Moment("run", 0, 1)))
    for record in model.bank.records.values():
        record.steps_in_stage = 5
    model.cancel_germination("0#0.0")
    controller.step(controller.observe(Moment("run", 0, 2)))
    assert [r.outcome.value for r in controller.reports] == ["CANCELLED"]
    assert not model.bank.grafted()
    controller.close()


def test_a_cancellation_that_comes_too_late_is_explained() -> None:
    model, controller = by_hand()
    model.request_germination("0#0.0", "BP-MLP-GELU", "fixed_ramp")
    controller.step(controller.observe(Moment("run", 0, 1)))
    model.cancellations.append(SeedId("0"))
    controller.step(controller.observe(Moment("run", 0, 2)))
    assert any("cannot be cancelled any more" in text for text in controller.explanations)
    controller.close()


def test_a_slow_build_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def path(slow: bool) -> list[str]:
        model, controller = controlled()
        if slow:
            ingest = LibraryKernelStore._ingest
            monkeypatch.setattr(LibraryKernelStore, "_ingest", lambda s, r: (time.sleep(0.3), ingest(s, r))[1])
        _, commands = controller.step(controller.observe(Moment("run", 0, 1)))
        controller.close()
        return [c.command.value for c in commands]

    assert path(slow=False) == path(slow=True)


def test_paused_means_nothing_new() -> None:
    model, controller = controlled()
    controller.pause()
    assert controller.step(controller.observe(Moment("run", 0, 5)))[1] == []
    controller.resume()
    assert controller.step(controller.observe(Moment("run", 0, 6)))[1]
    controller.close()


def test_tampered_state_is_noticed() -> None:
    model, controller = controlled()
    model.bank.arrays.columns["alpha"][0] = 0.5
    with pytest.raises(StateCorruption):
        controller.step(controller.observe(Moment("run", 0, 5)))
    controller.close()


def test_its_state_survives_a_round_trip() -> None:
    model, controller = controlled()
    walk(model, controller, 0.5)
    other = controlled()[1]
    other.load_state_dict(controller.state_dict())
    assert other.state_dict() == controller.state_dict()
    assert other.reports == controller.reports
    controller.close()
    other.close()


def test_the_packet_travels() -> None:
    model, controller = controlled()
    walk(model, controller, 0.5)
    packet = controller.observe(Moment("run", 2, 9), validation_loss=1.5)
    assert decode(SystemStatePacket, encode(packet)) == packet
    assert packet.state_of("0#0.0").value == "FOSSILIZED"
    controller.close()


def test_the_journal_appends(tmp_path: Path) -> None:
    model, controller = controlled()
    for _ in range(2):
        journal = Journal(tmp_path / "new" / "folder")
        controller.listeners = [journal.write]
        journal.write(controller.observe(Moment("run", 0, 0)))
        journal.close()
        journal.close()
    assert len((tmp_path / "new" / "folder" / "events.jsonl").read_text().splitlines()) == 2
    controller.close()
