"""Tamiyo's own signal: when it asks for a rollback, and when it does not."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import esper
from esper.kasmina.writer import Moment
from esper.leyline.reports import Counterfactual
from esper.tamiyo.config import RollbackConfig
from esper.tamiyo.gate import alarm


@pytest.mark.parametrize(
    ("losses", "before", "settings", "asks"),
    [
        ([2.0, 1.0, 0.5, 2.1], [0.5], {}, True),
        ([2.0, 1.0, 0.5, 1.9], [0.5], {}, False),  # better than at the first boundary
        ([2.0, 1.5, 1.5, 2.9], [1.5], {}, False),  # not twice as bad as before the child
        ([2.0, 1.5, 1.5, 2.9], [1.5], {"worsening": 0.5}, True),
        ([2.0, 1.0, 0.5, 9.0], [], {}, False),  # no child is in effect
        ([2.0, 1.0, 0.5, 9.0], [None], {}, False),
        ([2.0, 1.0, 0.5, 9.0], [0.5, 5.0], {}, False),
        ([9.0], [0.5], {}, False),
        ([2.0, 1.0, 0.5, 9.0], [0.5], {"worsening": None}, False),
        ([2.0, 1.0, 0.5, 9.0], [0.5], {"window": 0}, False),
        ([-1.0, -2.0, -3.0, -0.5], [-3.0], {}, False),
        ([-1.0, -2.0, -3.0, 0.5], [-3.0], {}, True),
    ],
)
def test_the_alarm(
    losses: Sequence[float], before: Sequence[float | None], settings: dict[str, float | None], asks: bool
) -> None:
    assert bool(alarm(losses, before, RollbackConfig.of(settings))) is asks


def controlled() -> tuple[esper.MorphableModel, esper.TamiyoController]:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), {"stabilization_steps": 1000})
    model(torch.randn(4, 8)).sum().backward()
    entry = {"at": 1, "blueprint": "BP-MLP-GELU", "params": 300}
    controller = esper.TamiyoController(model, {"policy": "schedule", "schedule": (entry,), "budget": 500})
    controller.evidence = lambda names: dict.fromkeys(names, Counterfactual(mean=1.0, lower=1.0, upper=1.0, n=8))
    controller.prepare(Moment("run", 0, 0))
    controller.store.close()
    return model, controller


def test_the_controller_asks_before_it_decides_anything() -> None:
    model, controller = controlled()
    for step, loss in ((1, 2.0), (2, 1.0)):
        signal, _ = controller.step(controller.observe(Moment("run", 0, step), validation_loss=loss))
        assert not signal.emergency_rollback_required
    (graft,) = model.bank.grafted().values()
    graft.set_alpha(0.5)
    calm, _ = controller.step(controller.observe(Moment("run", 0, 3), validation_loss=1.5))
    assert not calm.emergency_rollback_required
    before = [view.state for view in model.seeds]
    signal, commands = controller.step(controller.observe(Moment("run", 0, 4), validation_loss=5.0))
    assert signal.emergency_rollback_required and commands == []
    assert "5.0000" in signal.reason and [view.state for view in model.seeds] == before
    final, _ = controller.step(controller.observe(Moment("run", 0, 5), validation_loss=5.0), final=True)
    assert not final.emergency_rollback_required
    controller.close()


def test_a_request_is_answered_once() -> None:
    _, controller = controlled()
    controller.request_rollback("the user saw something")
    signal, _ = controller.step(controller.observe(Moment("run", 0, 0)))
    assert (signal.emergency_rollback_required, signal.reason) == (True, "the user saw something")
    again, _ = controller.step(controller.observe(Moment("run", 0, 0)))
    assert not again.emergency_rollback_required
    controller.close()


def test_conservative_mode_survives_a_checkpoint() -> None:
    _, controller = controlled()
    controller.calm_until = 50
    _, other = controlled()
    other.load_state_dict(controller.state_dict())
    other.step(other.observe(Moment("run", 0, 49)))
    assert not other.bank.records
    other.step(other.observe(Moment("run", 0, 50)))
    assert other.bank.records
    controller.close()
    other.close()
