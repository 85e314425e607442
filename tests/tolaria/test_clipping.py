"""Host and children are clipped apart."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from esper.tolaria.clipping import SeparateClipping
from esper.tolaria.optimizers import SEED_KEY


def optimizer_with(host_grad: float, child_grad: float) -> SGD:
    host, child = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    host.grad, child.grad = torch.full((4,), host_grad), torch.full((4,), child_grad)
    optimizer = SGD([host], lr=0.1)
    optimizer.add_param_group({"params": [child], SEED_KEY: "a#0.0"})
    return optimizer


def norms(optimizer: SGD) -> list[float]:
    return [float(group["params"][0].grad.norm()) for group in optimizer.param_groups]


def test_a_childs_large_gradient_does_not_shrink_the_hosts() -> None:
    optimizer = optimizer_with(0.1, 100.0)
    SeparateClipping()(optimizer, 1.0, "norm")
    assert norms(optimizer) == pytest.approx([0.2, 1.0])


def test_values_are_clipped_by_value() -> None:
    optimizer = optimizer_with(3.0, -3.0)
    SeparateClipping()(optimizer, 0.5, "value")
    assert norms(optimizer) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("value", [None, 0.0])
def test_no_clipping_where_none_is_asked_for(value: float | None) -> None:
    optimizer = optimizer_with(3.0, 4.0)
    SeparateClipping()(optimizer, value)
    assert norms(optimizer) == pytest.approx([6.0, 8.0])
