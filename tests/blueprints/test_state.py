"""State beside the weights: its precision, when it changes, and losses that come in through the backward pass."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from esper.blueprints.state import StatefulModule, with_loss


class Counting(StatefulModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nothing", None)

    def forward(self, x):
        if self.observes():
            self.passes += 1
        return x * self.weight


def test_state_stays_in_single_precision():
    module = Counting().to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert (module.seen.dtype, module.passes.dtype) == (torch.float32, torch.int64)
    assert module.double().seen.dtype == torch.float32


def test_a_pass_that_runs_again_counts_once():
    module, x = Counting(), torch.ones(3, 2, requires_grad=True)
    for reentrant in (True, False):
        checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert module.passes == 2
    module.eval()(x)
    assert module.passes == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_pass_counts_too():
    module = Counting()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    compiled(torch.ones(3, 2))
    compiled(torch.ones(3, 2))
    assert module.passes == 2


def test_a_loss_comes_in_with_the_gradient_whatever_its_size():
    x, weight = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    for scale in (1.0, 1000.0):
        x.grad = weight.grad = None
        (scale * with_loss(x, weight**3).sum()).backward()
        assert x.grad.tolist() == [scale] * 3
        assert weight.grad.item() == 12.0


def test_without_a_backward_pass_nothing_is_added():
    x, weight = torch.ones(3), torch.tensor(2.0, requires_grad=True)
    assert torch.equal(with_loss(x, weight**3), x)
    assert weight.grad is None
