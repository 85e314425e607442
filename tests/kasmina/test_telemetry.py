import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.kasmina.telemetry import (
    DEAD_VARIANCE,
    FORWARD_METRICS,
    MAX_ROWS,
    MAX_VALUES,
    MIN_ROWS,
    SATURATION_BAND,
    as_rows,
    chunk_gradient_norms,
    chunk_span,
    chunk_statistics,
    row_count,
    sampled_rows,
    sum_chunks,
)


def parts(features, chunks):
    """The rows of health: every chunk, then the whole site if there are several."""
    spans = [chunk_span(features, chunks, chunk) for chunk in range(chunks)]
    return [slice(start, start + width) for start, width in spans] + [slice(0, features)] * (chunks > 1)


def reference(rows, chunks):
    """The statistics by plain NumPy, one row of health at a time, in float64; saturation as a pair of bounds."""
    found, bounds = [], []
    for where in parts(rows.shape[1], chunks):
        part = rows[:, where].astype(np.float64)
        variance = part.var(0)
        alive = part[:, variance >= DEAD_VARIANCE]
        correlation = 0.0
        if alive.shape[1] > 1:
            matrix = np.corrcoef(alive, rowvar=False)
            correlation = matrix[~np.eye(len(matrix), dtype=bool)].mean()
        found.append([part.mean(), variance.mean(), 1 - alive.shape[1] / part.shape[1], correlation])
        bounds.append([saturation(part, SATURATION_BAND + slack) for slack in (-1e-5, 1e-5)])
    return np.array(found), np.array(bounds)


def saturation(part, band):
    """Rounding decides on which side a value at the very edge of the band lies."""
    low, high = part.min(0), part.max(0)
    edge = band * (high - low)
    count = ((part <= low + edge) | (part >= high - edge)).sum(0)
    return (np.maximum(count - 2, 0) / max(len(part) - 2, 1)).mean()


@st.composite
def activations(draw):
    features, samples = draw(st.integers(1, 24)), draw(st.integers(2, 40))
    chunks = draw(st.integers(1, features))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    common = draw(st.floats(0, 1))
    rows = (1 - common) * rng.normal(size=(samples, features)) + common * rng.normal(size=(samples, 1))
    rows = rows * draw(st.sampled_from([0.1, 1.0, 10.0])) + draw(st.sampled_from([0.0, 0.5, -3.0]))
    dead = rng.random(features) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    rows[:, dead] = draw(st.sampled_from([0.0, 1.5]))
    return rows.astype(np.float32), chunks


@settings(max_examples=150, deadline=None)
@given(activations())
def test_statistics_equal_numpy(given_):
    rows, chunks = given_
    found = chunk_statistics(torch.from_numpy(rows), chunks).numpy()
    expected, (low, high) = (each := reference(rows, chunks))[0], each[1].T
    assert found.shape == (row_count(chunks), len(FORWARD_METRICS))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, :4], expected, rtol=2e-3, atol=2e-4)
    assert (low - 1e-6 <= found[:, 4]).all() and (found[:, 4] <= high + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(activations())
def test_gradient_norms_equal_a_loop(given_):
    rows, chunks = given_
    found = chunk_gradient_norms(torch.from_numpy(rows), -1, chunks)
    expected = [np.linalg.norm(rows[:, where]) for where in parts(rows.shape[1], chunks)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


@given(features=st.integers(1, 300), data=st.data())
def test_spans_and_sums_are_the_same_partition(features, data):
    chunks = data.draw(st.integers(1, features))
    spans = [chunk_span(features, chunks, chunk) for chunk in range(chunks)]
    assert [start for start, _ in spans] == [sum(width for _, width in spans[:i]) for i in range(chunks + 1)][:-1]
    widths = [width for _, width in spans]
    assert sum(widths) == features
    assert len(set(widths[:-1])) <= 1
    assert widths[-1] == max(widths)
    values = torch.arange(2.0 * features).reshape(2, features)
    expected = torch.stack([values[:, start : start + width].sum(1) for start, width in spans], 1)
    assert torch.equal(sum_chunks(values, chunks), expected)


def test_what_cannot_be_computed_is_zero_not_nan():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_sample = chunk_statistics(torch.randn(1, 4), 2)
        one_each = chunk_statistics(torch.randn(5, 4), 4)
    assert torch.isfinite(one_sample).all()
    assert one_sample[:, 2].tolist() == [1.0, 1.0, 1.0]
    assert one_each[:4, 3].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.zeros(50, 3), 1.0),
        (torch.linspace(0, 1, 101)[:, None], 0.0),
        (torch.cat([torch.zeros(52), torch.linspace(0.1, 0.9, 49), torch.ones(1)])[:, None], 51 / 100),
        (torch.tanh(10 * torch.linspace(-1, 1, 202)[:, None]), 153 / 200),
    ],
)
def test_saturation_is_the_share_at_the_ends_of_the_range(values, expected):
    assert chunk_statistics(values, 1)[0, 4].item() == pytest.approx(expected, abs=0.03)
    moved = chunk_statistics(values * -7 + 3, 1)[0, 4].item()
    assert moved == pytest.approx(expected, abs=0.03), "neither place nor scale matter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "dim"), [((4, 6), -1), ((2, 3, 6), -1), ((2, 6, 3, 5), 1)])
def test_rows_have_the_features_last(shape, dim, dtype):
    y = torch.randn(shape).to(dtype).requires_grad_()
    rows = as_rows(y, dim)
    assert (rows.shape[1], rows.dtype, rows.requires_grad) == (6, torch.float32, False)
    other = [axis for axis in range(y.dim()) if axis != dim % y.dim()]
    assert torch.allclose(rows.mean(0), y.detach().float().mean(other), atol=1e-2)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=1).flatmap(
        lambda b: st.sampled_from([(*b, 6), (*b, 50, 6), (400, 6), (3, 6, 40, 20), (*b, 6, 1, 1), (2, 300, 700)])
    ),
    contiguous=st.booleans(),
)
def test_sampled_rows_are_some_of_the_rows_and_a_copy(shape, contiguous):
    dim = 1 if len(shape) == 4 else -1
    y = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    y = y if contiguous else y.flip(0).transpose(0, -1).contiguous().transpose(0, -1)
    rows, every = sampled_rows(y, dim), as_rows(y, dim)
    most = min(MAX_ROWS, max(MIN_ROWS, MAX_VALUES // y.shape[dim]))
    assert 1 <= len(rows) <= most
    assert len(rows) >= min(len(every), most) / 4, "what may be read is used"
    assert {tuple(row) for row in rows.tolist()} <= {tuple(row) for row in every.tolist()}
    y.zero_()
    assert rows.any()
