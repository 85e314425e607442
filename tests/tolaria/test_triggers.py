"""What makes a run go back, and what must not."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.events import RollbackTrigger
from esper.tamiyo.config import RollbackConfig
from esper.tamiyo.emergency import triggers_of
from esper.tolaria.triggers import GO_ON, LossSpike, NonFiniteLoss, trigger_of, verdict_of
from tests.helpers import Plain, digits, trainer

SPIKE = {"threshold": 6.0, "patience": 5, "window": 50, "minimum": 20}


def alarms(losses: list[float], trigger: LossSpike | None = None) -> list[int]:
    """Return the indices at which the default spike trigger fires."""
    trigger = trigger or LossSpike(**SPIKE)
    return [index for index, loss in enumerate(losses) if trigger.observe(loss)]


def healthy(steps: int = 200, seed: int = 0) -> list[float]:
    """Return a noisy curve that falls from about 2.3 to 0.3."""
    draw = random.Random(seed)
    return [(0.3 + 2 * math.exp(-step / 60)) * draw.lognormvariate(0, 0.15) for step in range(steps)]


@pytest.mark.parametrize(("loss", "fires"), [(1.0, False), (-3.0, False), (math.nan, True), (math.inf, True)])
def test_only_a_number_is_finite(loss: float, fires: bool) -> None:
    assert NonFiniteLoss().observe(loss) is fires


def test_a_lasting_jump_is_a_spike_after_its_patience() -> None:
    assert alarms([*healthy(), *[6.0] * 5]) == [204]


def test_single_outliers_are_not_and_leave_the_trigger_as_it_was() -> None:
    trigger = LossSpike(**SPIKE)
    losses = [loss if step % 7 else 30.0 for step, loss in enumerate(healthy())]
    assert alarms(losses, trigger) == []
    assert alarms([*[6.0] * 4, 0.3, *[6.0] * 4], trigger) == []


def test_a_loss_that_has_become_tiny_may_become_less_tiny() -> None:
    falling = [2.0 * 0.9**step for step in range(150)]
    assert alarms([*falling, *[0.05] * 20]) == []
    assert alarms([*falling, *[0.5] * 20])


def test_nothing_is_a_spike_before_enough_is_known() -> None:
    assert alarms([0.1] * 10 + [50.0] * 9) == []


def test_numbers_that_are_none_do_not_enter_the_window() -> None:
    trigger = LossSpike(**SPIKE)
    alarms([*healthy(), *[math.nan] * 60], trigger)
    assert alarms([6.0] * 5, trigger) == [4]


@given(st.floats(0.01, 100), st.floats(-1000, 1000), st.integers(0, 1000))
def test_noise_of_any_scale_around_any_level_is_healthy(scale: float, level: float, seed: int) -> None:
    draw = random.Random(seed)
    assert alarms([level + draw.gauss(0, scale) for _ in range(300)]) == []


@given(st.integers(30, 150), st.integers(0, 1000))
def test_a_state_goes_on_where_it_was_taken(cut: int, seed: int) -> None:
    losses = [*healthy(seed=seed), *[9.0] * 6]
    first, second = LossSpike(**SPIKE), LossSpike(**SPIKE)
    alarms(losses[:cut], first)
    second.load_state_dict(first.state_dict())
    rest = alarms(losses[cut:], first)
    assert rest and alarms(losses[cut:], second) == rest


@given(st.lists(st.sampled_from(RollbackTrigger), min_size=1, max_size=4))
def test_the_largest_verdict_of_the_ranks_is_one_of_theirs(found: list[RollbackTrigger]) -> None:
    verdicts = [GO_ON, *map(verdict_of, found)]
    assert trigger_of(max(verdicts)) in found


def test_triggers_follow_the_settings() -> None:
    assert [type(t) for t in triggers_of(RollbackConfig(spike=None))] == [NonFiniteLoss]
    found = triggers_of(RollbackConfig(spike=4.0, spike_patience=2, spike_window=10))[1]
    assert isinstance(found, LossSpike)
    assert (found.threshold, found.patience, found.minimum) == (4.0, 2, 10)


def sgd(module: Plain) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.03)


def restarts(module: Plain) -> Any:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 100)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "epochs", "optimizers"), [(64, 30, None), (4, 6, None), (1, 2, sgd), (64, 40, restarts)]
)
def test_real_runs_are_healthy(tmp_path: Path, batch: int, epochs: int, optimizers: Any) -> None:
    module = Plain("lambda")
    if optimizers is not None:
        module.configure_optimizers = lambda: optimizers(module)  # type: ignore[method-assign]
    quiet = trainer(tmp_path, None, epochs=epochs, enable_checkpointing=False, callbacks=[], limit_val_batches=0)
    quiet.fit(module, datamodule=digits(batch_size=batch))
    assert len(module.train_losses) >= 300
    assert alarms(module.train_losses) == []
