import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.kasmina.spectrum import effective_ranks, growth_potentials
from esper.kasmina.telemetry import DEAD_VARIANCE, row_count, sampled_rows
from tests.kasmina.test_telemetry import activations, parts


def rank_by_eigenvalues(part):
    """`(sum e)^2 / sum e^2` over the spectrum of the covariance of the living features."""
    alive = part[:, part.var(0) >= DEAD_VARIANCE]
    if not alive.size:
        return 0.0
    spectrum = np.linalg.eigvalsh(np.cov(alive, rowvar=False, bias=True).reshape(alive.shape[1], -1))
    return spectrum.sum() ** 2 / np.square(spectrum).sum()


@settings(max_examples=60, deadline=None)
@given(activations())
def test_ranks_equal_those_of_the_spectrum(given_):
    rows, chunks = given_
    found = effective_ranks(torch.from_numpy(np.stack([rows, rows * 2])), chunks)
    expected = [rank_by_eigenvalues(rows[:, where].astype(np.float64)) for where in parts(rows.shape[1], chunks)]
    assert found.shape == (2, row_count(chunks))
    for reading in found.numpy():
        np.testing.assert_allclose(reading, expected, rtol=2e-3)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_the_rank_of_equally_strong_directions_is_their_number(rank):
    directions = torch.linalg.qr(torch.randn(40, rank)).Q
    samples = torch.linalg.qr(torch.randn(200, rank) - 0.0).Q
    samples = samples - samples.mean(0)
    assert effective_ranks((samples @ directions.T)[None], 1).item() == pytest.approx(rank, rel=0.1)


@pytest.mark.parametrize("scale", [1e-4, 1e12])
def test_ranks_do_not_depend_on_the_scale(scale):
    rows = torch.randn(1, 20, 6)
    assert effective_ranks(rows * scale, 2).tolist()[0] == pytest.approx(effective_ranks(rows, 2).tolist()[0], rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(activations(), st.integers(0, 2**16))
def test_growth_potentials_equal_the_gradient_of_a_zero_linear_map(given_, seed):
    rows, chunks = given_
    grads = np.random.default_rng(seed).normal(size=rows.shape).astype(np.float32)
    found = growth_potentials(torch.from_numpy(rows)[None], torch.from_numpy(grads)[None], chunks, len(rows))[0]
    for value, where in zip(found.tolist(), parts(rows.shape[1], chunks), strict=True):
        y, g = rows[:, where].astype(np.float64), grads[:, where].astype(np.float64)
        bound = np.square(np.linalg.norm(y) * np.linalg.norm(g))
        assert value == pytest.approx(np.square(g.T @ y).sum(), rel=1e-3, abs=1e-5 * bound)


def test_the_growth_potential_is_what_autograd_says():
    """One more linear unit per feature, with weights of zero behind it."""
    torch.manual_seed(0)
    y, new = torch.randn(12, 5), torch.zeros(5, 5, requires_grad=True)
    out = (y + y @ new.T).requires_grad_()
    out.retain_grad()
    out.cos().square().sum().backward()
    found = growth_potentials(y[None], out.grad[None], 1, 12)
    assert found.sqrt().item() == pytest.approx(new.grad.norm().item(), rel=1e-4)


@pytest.mark.parametrize(("features", "kept"), [(6, 12), (40, 9)])
def test_growth_potentials_of_some_samples_estimate_that_of_all(features, kept):
    """Without bias: the mean over many choices of samples is that of the whole batch."""
    generator = torch.Generator().manual_seed(1)
    y, g = (torch.randn(36, features, generator=generator) for _ in range(2))
    chosen = [torch.randperm(36, generator=generator)[:kept] for _ in range(3000)]
    rows, grads = (torch.stack([t[some] for some in chosen]) for t in (y, g))
    found = growth_potentials(rows, grads, 1, 36)[:, 0]
    whole = growth_potentials(y[None], g[None], 1, 36).item()
    assert found.mean().item() == pytest.approx(whole, abs=4 * found.std().item() / math.sqrt(len(chosen)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [1, 3, 6])
@pytest.mark.parametrize(("shape", "dim"), [((9, 6), -1), ((3, 4, 6), -1), ((3, 6, 2, 3), 1)])
def test_every_layout_and_precision(shape, dim, chunks, dtype):
    y, g = (torch.randn(shape).to(dtype) for _ in range(2))
    rows, grads = (sampled_rows(t, dim)[None] for t in (y, g))
    ranks, growth = effective_ranks(rows, chunks)[0], growth_potentials(rows, grads, chunks, rows.shape[1])[0]
    flat = [t.float().movedim(dim, -1).reshape(-1, 6).double().numpy() for t in (y, g)]
    for row, where in enumerate(parts(6, chunks)):
        part, grad = (t[:, where] for t in flat)
        assert ranks[row].item() == pytest.approx(rank_by_eigenvalues(part), rel=1e-3)
        assert growth[row].item() == pytest.approx(np.square(grad.T @ part).sum(), rel=1e-3, abs=1e-4)


def test_autocast_does_not_blur_them():
    rows, grads = torch.randn(2, 20, 6), torch.randn(2, 20, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = effective_ranks(rows, 1), growth_potentials(rows, grads, 1, 20)
    assert torch.equal(inside[0], effective_ranks(rows, 1))
    assert torch.equal(inside[1], growth_potentials(rows, grads, 1, 20))


@pytest.mark.parametrize("samples", [1, 2])
def test_too_few_samples_give_numbers(samples):
    rows = torch.randn(1, samples, 4)
    assert torch.isfinite(effective_ranks(rows, 2)).all()
    assert torch.isfinite(growth_potentials(rows, rows, 2, samples)).all()
