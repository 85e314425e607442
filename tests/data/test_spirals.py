"""The spirals: the points lie where the formula says."""

import math

import pytest
import torch

from esper.data import Spirals
from esper.data.spirals import spiral_points
from esper.leyline.errors import ConfigError


def test_points_without_noise_lie_on_their_spiral() -> None:
    x, y = spiral_points(500, turns=3, noise=0)
    radius = x.norm(dim=1)
    angle = math.pi * (2 * 3 * radius + y)
    assert torch.allclose(x, radius[:, None] * torch.stack((angle.cos(), angle.sin()), 1), atol=1e-5)
    assert float(radius.max()) <= 1


def test_noise_has_the_given_size() -> None:
    clean, noisy = (spiral_points(4000, turns=3, noise=noise)[0] for noise in (0, 0.03))
    assert float((noisy - clean).std()) == pytest.approx(0.03, rel=0.05)


def test_default_sizes_and_balance() -> None:
    module = Spirals()
    assert [len(part) for part in module.parts] == [2000, 1000, 4000]
    assert 0.45 < float(spiral_points(7000, turns=3, noise=0)[1].float().mean()) < 0.55


@pytest.mark.parametrize("settings", [{"turns": 0}, {"turns": math.inf}, {"noise": -0.1}, {"noise": math.nan}])
def test_impossible_shapes_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="turns must be positive and noise 0 or more"):
        Spirals(**settings)  # type: ignore[arg-type]
