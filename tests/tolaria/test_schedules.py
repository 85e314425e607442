"""The warm-up and decay shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.errors import ConfigError
from esper.tolaria.schedules import WarmupDecay


@given(st.integers(1, 500), st.integers(0, 100), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_the_factor_stays_between_zero_and_one(total: int, warm: int, decay: float, floor: float, step: int) -> None:
    assert 0 <= WarmupDecay(total, warm, decay, floor)(step) <= 1


def test_it_ends_at_the_floor() -> None:
    assert WarmupDecay(2400, 60, 0.3, 0.05)(2400) == pytest.approx(0.05)
    assert WarmupDecay(2400, 60, 0.3, 0.05)(1680) == 1.0


@pytest.mark.parametrize("bad", [{"decay": 1.5}, {"floor": -0.1}, {"warmup_steps": -1}])
def test_values_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="in \\[0, 1\\]"):
        WarmupDecay(100, **bad)  # type: ignore[arg-type]
