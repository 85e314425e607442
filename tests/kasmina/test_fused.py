import torch
from torch import nn

from esper.kasmina import fused, telemetry
from esper.kasmina.blend import Addition, blend_by_torch
from tests.kasmina.conftest import same_bits


def test_on_a_cpu_plain_torch_runs():
    y, rows = torch.randn(4, 6), torch.randn(2, 9, 6)
    additions = [Addition(torch.randn(4, 3), torch.tensor(0.5), 3, 3)]
    assert not fused.runs_triton(y)
    assert same_bits(fused.blend(y, additions, -1), blend_by_torch(y, additions, -1))
    assert same_bits(fused.chunk_moments(rows, 2), telemetry.chunk_moments(rows, 2))


def test_where_triton_may_run(monkeypatch):
    monkeypatch.setattr(fused, "_has_engine", lambda device_type: True)
    one, half = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)

    class Shard(torch.Tensor):
        """As a sharded tensor is: a subclass that knows what its operations mean."""

    assert fused.runs_triton(one, half, nn.Parameter(one))
    assert not fused.runs_triton(one.double())
    assert not fused.runs_triton(one, one.to("meta")), "on two devices"
    assert not fused.runs_triton(one.as_subclass(Shard))
    seen = []
    torch.func.vmap(lambda t: (seen.append(fused.runs_triton(one)), t)[1])(one)
    assert seen == [False], "inside a transformed function"


def test_what_triton_cannot_do_is_done_by_torch(monkeypatch):
    """An alpha that wants a gradient, and more rows than one tile holds."""
    monkeypatch.setattr(fused, "_has_engine", lambda device_type: True)
    alpha = torch.tensor(0.5, requires_grad=True)
    fused.blend(torch.zeros(2, 3), [Addition(torch.ones(2, 3), alpha, 0, None)], -1).sum().backward()
    assert alpha.grad.item() == 6.0
    rows = torch.randn(1, telemetry.MAX_ROWS + 1, 2)
    assert same_bits(fused.chunk_moments(rows, 1), telemetry.chunk_moments(rows, 1))
