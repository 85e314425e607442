"""Health and its trends come back bit for bit, also from the middle of a span between two boundaries."""

import io

import numpy as np
import pytest
import torch

from esper.kasmina.steps import boundary_health
from esper.tolaria.seeds_state import restore_seeds, seeds_state
from tests.kasmina.conftest import Rig, batch, mlp

SPAN = 9


def rig(chunks):
    return Rig(mlp(), batch(), config={"seeds_per_layer": chunks, "telemetry_every": 1})


def run(found, first, last):
    """Train some steps, with a boundary after every span; return the health at each."""
    seen, optimizer = [], torch.optim.SGD(found.model.host.parameters(), lr=0.05)
    for step in range(first, last):
        found.stepper.begin(step)
        optimizer.zero_grad()
        found.model(batch().roll(step, 0) * (1 + step % 3)).square().mean().backward()
        optimizer.step()
        if step % SPAN == SPAN - 1:
            seen.append(np.concatenate(boundary_health(list(found.bank.all_layers()))))
    return seen


def through_a_file(state):
    data = io.BytesIO()
    torch.save(state, data)
    data.seek(0)
    return torch.load(data, weights_only=True)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("stop", [SPAN, SPAN + 1, 2 * SPAN + 5])
def test_health_and_trends_resume_bit_for_bit(stop, chunks):
    whole, first, resumed = rig(chunks), rig(chunks), rig(chunks)
    expected = run(whole, 0, 4 * SPAN)
    seen = run(first, 0, stop)
    saved = through_a_file({"seeds": seeds_state(first.bank), "host": first.model.host.state_dict()})
    resumed.model.host.load_state_dict(saved["host"])
    restore_seeds(resumed.bank, saved["seeds"])
    seen += run(resumed, stop, 4 * SPAN)
    assert len(seen) == len(expected) == 4
    assert all(one.tobytes() == two.tobytes() for one, two in zip(seen, expected, strict=True))
    assert np.count_nonzero(expected[-1][:, -4:]) > 0, "the trends say something"


def test_health_of_an_earlier_release_starts_anew():
    found, state = rig(1), seeds_state(rig(1).bank)
    for saved in state["layers"].values():
        saved["health"] = torch.ones(1, 6)
        saved["samples"] = [1.0] * 6
        del saved["history"]
        saved["facts"] = ["bd", 8, 3, 1, True]
    restore_seeds(found.bank, state)
    layer = found.bank.layer("2")
    assert not layer.samples.any() and not layer.health.any()
    assert layer.facts.input_width == 3
