import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from esper.kasmina.telemetry import COLUMN, METRICS
from esper.kasmina.trends import FOLLOWED, TREND_METRICS, WINDOW, no_history, remember, slopes

values = st.floats(0, 1e3, width=32) | st.just(np.nan)


@settings(max_examples=60, deadline=None)
@given(st.lists(arrays(np.float32, (WINDOW, 2, len(FOLLOWED)), elements=values), min_size=1, max_size=2))
def test_slopes_equal_a_fitted_line(histories):
    found = slopes(histories)
    assert found.shape == (2 * len(histories), len(TREND_METRICS))
    assert np.isfinite(found).all()
    columns = np.concatenate(histories, axis=1).transpose(1, 2, 0)
    for row, column in np.ndindex(found.shape):
        v = columns[row, column].astype(np.float64)
        seen = np.flatnonzero(np.isfinite(v))
        expected = np.polyfit(seen, v[seen], 1)[0] if len(seen) > 1 else 0.0
        if list(FOLLOWED.values())[column]:
            expected = expected / v[seen].mean() if v[seen].any() else 0.0
        assert found[row, column] == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_a_history_remembers_the_last_boundaries():
    history = no_history(3)
    for boundary in range(WINDOW + 2):
        health = np.full((3, len(METRICS)), np.nan)
        health[:, COLUMN["gradient_norm"]] = float(boundary)
        history = remember(history, health)
    norms = history[:, 0, list(FOLLOWED).index("gradient_norm")]
    assert norms.tolist() == [float(boundary) for boundary in range(2, WINDOW + 2)]
    assert remember(history, np.full((3, len(METRICS)), np.nan)) is history


def test_an_infinite_norm_is_passed_over():
    history = no_history(1)
    history[-3:, 0, 0] = [1.0, np.inf, 2.0]
    assert slopes([history])[0, 0] == pytest.approx(0.5 / 1.5)


def test_no_layers_have_no_slopes():
    assert slopes([]).shape == (0, len(TREND_METRICS))
