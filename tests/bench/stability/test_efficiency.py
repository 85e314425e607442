"""Equal gain."""

import math

import pytest

from esper.bench.stability.efficiency import Point, Size, size_at
from esper.bench.stability.summary import compared
from esper.bench.stability.table import ratio


def test_sizes_are_interpolated_on_the_logarithm():
    points = [Point(10000, 0.3), Point(100, 0.1), Point(1000, 0.2)]
    assert size_at(points, 0.25) == (pytest.approx(math.sqrt(1000 * 10000)), False)
    assert size_at(points, 0.2) == (pytest.approx(1000), False)
    assert size_at(points, 0.05) == (100, True), "fewer may do"
    assert math.isnan(size_at(points, 0.31).params) and math.isnan(size_at([], 0.1).params)


def test_a_larger_size_that_gains_less_is_stepped_over():
    found = size_at([Point(100, 0.1), Point(1000, 0.05), Point(10000, 0.3)], 0.2)
    assert found.params == pytest.approx(10**3.6)


def test_arms_are_compared_at_shares_of_what_full_fine_tuning_gains():
    def made(*points: tuple[float, float]) -> list[dict[str, object]]:
        return [{"points": [{"params": params, "gain": gain + off} for params, gain in points]} for off in (-0.1, 0.1)]

    rows = {"full": made((5000, 0.3), (5000, 0.4)), "gelu": made((100, 0.1), (1000, 0.3000001)), "lora": []}
    found = {share: (gain, sizes) for share, gain, sizes in compared(rows)}
    gain, sizes = found[0.5]
    assert gain == pytest.approx(0.2) and sizes["full"] == Size(5000)
    assert sizes["gelu"].params == pytest.approx(math.sqrt(100 * 1000), rel=1e-4) and "lora" not in sizes
    assert ratio(sizes, "full") == "15.8" and not ratio(sizes, "lora")
    assert found[0.25][1]["gelu"] == Size(100, at_most=True) and ratio(found[0.25][1], "full") == "≥ 50.0"
