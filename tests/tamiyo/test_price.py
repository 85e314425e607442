"""What a child must gain, by what it costs."""

import pytest

from esper.blueprints.estimate import Estimate
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.price import UNITS, price, size

CHILD = Estimate(params=2_000, macs=3_000_000, latency_ms=0.5, memory_mb=1.0)


def test_every_cost_adds_to_the_price() -> None:
    config = TamiyoConfig(min_effect=0.001, price_per_kparam=0.01, price_per_mmac=0.02, price_per_ms=0.1)
    assert price(CHILD, config) == pytest.approx(0.001 + 0.02 + 0.06 + 0.05)
    assert price(CHILD, TamiyoConfig(price_per_kparam=0.0)) == 0.0


def test_gains_are_compared_by_what_the_config_says() -> None:
    found = [size(CHILD, TamiyoConfig(rank_by=by)) for by in UNITS]  # type: ignore[arg-type]
    assert found == [2.0, 3.0, 0.5]
    assert size(Estimate(0, 0, 0.0, 0.0), TamiyoConfig()) > 0  # a child without parameters
