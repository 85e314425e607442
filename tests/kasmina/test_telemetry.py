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
    as_rows,
    chunk_gradient_norms,
    chunk_span,
    chunk_statistics,
    sampled_rows,
    sum_chunks,
)


def reference(rows, chunks):
    """The four statistics by plain NumPy, one chunk at a time, in float64."""
    found = []
    for chunk in range(chunks):
        start, width = chunk_span(rows.shape[1], chunks, chunk)
        part = rows[:, start : start + width].astype(np.float64)
        variance = part.var(0)
        alive = part[:, variance >= DEAD_VARIANCE]
        correlation = 0.0
        if alive.shape[1] > 1:
            matrix = np.corrcoef(alive, rowvar=False)
            correlation = matrix[~np.eye(len(matrix), dtype=bool)].mean()
        found.append([part.mean(), variance.mean(), 1 - alive.shape[1] / width, correlation])
    return np.array(found)


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
    assert found.shape == (chunks, len(FORWARD_METRICS))
    np.testing.assert_allclose(found, reference(rows, chunks), rtol=2e-3, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(activations())
def test_gradient_norms_equal_a_loop(given_):
    rows, chunks = given_
    found = chunk_gradient_norms(torch.from_numpy(rows), -1, chunks)
    for chunk in range(chunks):
        start, width = chunk_span(rows.shape[1], chunks, chunk)
        assert found[chunk].item() == pytest.approx(np.linalg.norm(rows[:, start : start + width]), rel=1e-4)


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
    assert one_sample[:, 2].tolist() == [1.0, 1.0]
    assert one_each[:, 3].tolist() == [0.0] * 4


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
