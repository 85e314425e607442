"""A checker that cannot fail checks nothing."""

import pytest
import torch

from esper.kasmina import checks, fused, telemetry
from esper.kasmina.blend import Addition, blend_by_torch

ROWS = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
HALF = [Addition(torch.ones(4, 6), torch.tensor(0.5), 0, None)]


@pytest.fixture
def engine(monkeypatch):
    """Pretend that Triton runs here; the test says what it returns."""
    monkeypatch.setattr(fused, "runs_triton", lambda *tensors: True)
    return lambda name, value: monkeypatch.setattr(fused, name, value)


def test_without_an_engine_the_check_says_so():
    with pytest.raises(AssertionError, match="Triton does not run on cpu in this process"):
        checks.check_triton("cpu")


def test_plain_torch_passes(engine):
    engine("chunk_moments", telemetry.chunk_moments)
    engine("blend", blend_by_torch)
    checks.check_triton("cpu")


def test_wrong_moments_are_found(engine):
    engine("chunk_moments", lambda rows, chunks: telemetry.chunk_moments(rows, chunks) * 1.01)
    with pytest.raises(AssertionError, match=r"the statistics of \(2, 9, 6\) in 2 chunks differs by"):
        checks.check_moments(ROWS, 2)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda y, additions, dim: blend_by_torch(y, additions, dim) + 1e-3, "the result"),
        (lambda y, additions, dim: blend_by_torch(y.detach() + 0 * y, additions, dim), "gradient 0"),
        (lambda y, additions, dim: blend_by_torch(y, additions, dim)[:2], "shape"),
        (lambda y, additions, dim: blend_by_torch(y, additions, dim).bfloat16(), "torch.bfloat16, expected"),
        (lambda y, additions, dim: blend_by_torch(y, additions, dim) + 0.0, "the sign of a zero"),
    ],
)
def test_a_wrong_blend_is_found(engine, wrong, what):
    engine("blend", wrong)
    with pytest.raises(AssertionError, match=what):
        checks.check_blend(Y, HALF, -1)
