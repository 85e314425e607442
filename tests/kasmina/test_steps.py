import math

import numpy as np
import pytest
import torch
from torch import nn

from esper.kasmina.steps import SeedStepper, drain_health
from esper.kasmina.strategies import STRATEGIES
from esper.kasmina.telemetry import COLUMN
from esper.leyline.ids import SeedId
from tests.kasmina.conftest import C, Rig, S, batch, counts, mlp, wake


@pytest.mark.parametrize(("every", "steps", "expected"), [(1, 6, 6), (3, 7, 3), (20, 20, 1), (0, 5, 0)])
def test_health_is_sampled_every_nth_step(every, steps, expected):
    rig = Rig(mlp(), batch(), config={"telemetry_every": every})
    for step in range(steps):
        rig.stepper.begin(step)
        rig.forward_backward()
    layer = rig.bank.layer("2")
    assert counts(layer) == (expected, expected, 0)
    health = drain_health([layer])[0]
    assert bool(torch.isnan(health).all()) == (expected == 0)
    assert not layer.samples.any()
    assert torch.isnan(drain_health([layer])[0]).all()


def test_health_is_the_mean_over_the_samples(rig):
    layer, seen = rig.bank.layer("2"), []
    rig.model.host[2].register_forward_hook(lambda _, __, y: seen.append(y.detach().numpy().copy()) and None)
    for step in range(3):
        rig.stepper.begin(rig.bank.config.telemetry_every * step)
        rig.model(batch() * (step + 1)).square().mean().backward()
    health = drain_health([layer])[0][0]
    assert health[COLUMN["chunk_mean"]].item() == pytest.approx(np.mean([y.mean() for y in seen]), abs=1e-6)
    assert health[COLUMN["chunk_variance"]].item() == pytest.approx(np.mean([y.var(0).mean() for y in seen]), rel=1e-4)


def test_the_gradient_norm_is_that_of_the_output(rig):
    rig.stepper.begin(0)
    grads = []
    handle = rig.model.host[2].register_forward_hook(lambda _, __, y: y.register_hook(grads.append) and None)
    rig.forward_backward()
    handle.remove()
    health = drain_health([rig.bank.layer("2")])[0]
    assert health[0, COLUMN["gradient_norm"]].item() == pytest.approx(float(grads[0].norm()), rel=1e-5)


def test_the_newborn_incumbent_ratio(rig):
    rig.stepper.begin(0)
    graft = wake(rig.grow("2#0.0", alpha=0.5))
    rig.model.zero_grad()
    rig.forward_backward()
    rig.stepper.observe_gradients()

    def rms(module):
        return float(torch.cat([p.grad.flatten() for p in module.parameters()]).square().mean().sqrt())

    expected = rms(graft.child) / rms(rig.model.host[2])
    assert drain_health([rig.bank.layer("2")])[0][0, COLUMN["newborn_incumbent_ratio"]].item() == pytest.approx(
        expected, rel=1e-5
    )


def test_no_ratio_without_gradients(rig):
    rig.stepper.begin(0)
    rig.grow("2#0.0", alpha=0.5)
    rig.model.zero_grad()
    rig.stepper.observe_gradients()
    rig.stepper.begin(1)
    rig.forward_backward()
    rig.stepper.observe_gradients()
    assert math.isnan(drain_health([rig.bank.layer("2")])[0][0, COLUMN["newborn_incumbent_ratio"]])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_ramp_moves_alpha_and_is_remembered(strategy):
    rig = Rig(mlp(), batch(), config={"ramp_steps": 5})
    graft = rig.grow("2#0.0", grafting_strategy=strategy)
    wake(graft, 0.05)
    alphas = []
    for _ in range(40):
        rig.train(1, lr=1e-4)
        alphas.append(graft.strength)
        if graft.strength == 1.0:
            break
    assert alphas == sorted(alphas)
    assert alphas[-1] == 1.0 == float(graft.alpha)
    assert rig.bank.records[SeedId("2")].strategy_state["steps"] == 5


def test_a_new_stepper_goes_on_where_the_old_one_was(rig):
    graft = rig.grow("2#0.0")
    for _ in range(3):
        rig.stepper.end(1.0)
    SeedStepper(rig.bank).end(1.0)
    assert graft.strength == pytest.approx(4 / rig.bank.config.ramp_steps)


def test_a_strategy_is_forgotten_with_its_seed(rig):
    rig.grow("2#0.0")
    rig.stepper.end(1.0)
    rig.cull("2#0.0")
    rig.stepper.forget(SeedId("2"))
    rig.do(C.RELEASE, "2#0.0")
    graft = rig.grow("2#0.0")
    rig.stepper.end(1.0)
    assert graft.strength == pytest.approx(1 / rig.bank.config.ramp_steps)


def test_alpha_moves_in_grafting_only(rig):
    for seed, state in (("0#0.0", S.TRAINING), ("2#0.0", S.STABILIZATION), ("4#0.0", S.FOSSILIZED)):
        rig.grow(seed, state)
    rig.stepper.end(1.0)
    assert {graft.strength for graft in rig.bank.grafted().values()} == {0.0}
    assert {record.steps_in_stage for record in rig.bank.records.values()} == {1}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_not_a_number_does_not_stop_the_run(strategy):
    rig = Rig(mlp(), batch())
    rig.grow("2#0.0", grafting_strategy=strategy)
    for loss in (1.0, math.nan, math.inf, 1.0):
        rig.stepper.end(loss)
    assert 0.0 <= rig.bank.graft(SeedId("2")).strength <= 1.0


def test_a_site_without_weights_has_no_drift():
    rig = Rig(nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 2)), batch(), targets=["1"])
    graft = rig.grow("1#0.0", grafting_strategy="drift_controlled")
    rig.stepper.end(1.0)
    assert graft.strength > 0
