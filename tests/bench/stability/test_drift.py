"""How far representations moved."""

import math

import pytest
import torch
from torch import nn

from esper.bench.stability.drift import Probe, cosine_drift


def test_the_drift_of_known_tensors():
    then = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    now = torch.tensor([[5.0, 0.0], [-1.0, 0.0], [1.0, math.sqrt(3)]])
    # Length does not count; the opposite is 2, sixty degrees are a half.
    assert cosine_drift(then, now) == pytest.approx((0 + 2 + 0.5) / 3)
    assert cosine_drift(then, then.clone()) == 0.0


def test_a_probe_tells_what_is_before_a_place_from_what_is_behind_it():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Identity(), nn.Linear(8, 8), nn.Identity()).train()
    probe = Probe(network, network[1], network[3], torch.randn(5, 4))
    assert probe.drift() == (0.0, 0.0)
    with torch.no_grad():
        network[2].weight.mul_(-1)
    assert probe.drift().upstream == 0.0 and probe.drift().downstream > 0.1
    assert network.training, "a probe leaves the network as it was"
