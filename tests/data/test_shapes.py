"""The shapes: the pictures show what the formula says."""

import math

import pytest
import torch
from torch import Tensor

from esper.data import Shapes
from esper.data.shapes import SHAPES, SIDE, shape_pictures
from esper.leyline.errors import ConfigError


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    """Pictures without noise, and their classes."""
    return shape_pictures(1000, noise=0)


def test_shapes_are_bright_on_a_dark_ground_and_inside_the_picture(drawn: tuple[Tensor, Tensor]) -> None:
    clean, _ = drawn
    assert float(clean.min()) == 0
    brightest = clean.flatten(1).max(1).values
    assert float(brightest.min()) > 0.45 and float(brightest.max()) <= 1
    frame = torch.cat((clean[..., 0, :], clean[..., -1, :], clean[..., 0], clean[..., -1]), dim=-1)
    assert float(frame.mean()) < 0.05


def test_a_ring_is_dark_in_the_middle_and_the_others_are_bright_there(drawn: tuple[Tensor, Tensor]) -> None:
    clean, labels = drawn
    grid = torch.arange(SIDE, dtype=torch.float32)
    weights = clean.squeeze(1) / clean.sum((1, 2, 3)).view(-1, 1, 1)
    row, column = (weights.sum(2) @ grid).round().long(), (weights.sum(1) @ grid).round().long()
    middle = clean[torch.arange(len(clean)), 0, row, column] / clean.flatten(1).max(1).values
    ring = SHAPES.index("ring")
    assert float(middle[labels == ring].mean()) < 0.25
    assert float(middle[labels != ring].mean()) > 0.95


def test_areas_rank_as_the_shapes_do(drawn: tuple[Tensor, Tensor]) -> None:
    """Areas in the unit circle: circle 2.54, ring 1.88, square 1.96, cross 1.92, triangle 1.30."""
    clean, labels = drawn
    area = {name: float(((clean > 0.25).sum((1, 2, 3)))[labels == k].float().mean()) for k, name in enumerate(SHAPES)}
    assert min(area, key=area.__getitem__) == "triangle" and max(area, key=area.__getitem__) == "circle"
    assert area["circle"] / area["triangle"] == pytest.approx(0.81 * math.pi / (0.75 * 3**0.5), rel=0.2)


def test_noise_has_the_given_size_and_the_pictures_do_not_change(drawn: tuple[Tensor, Tensor]) -> None:
    noisy = shape_pictures(1000, noise=0.2)[0]
    assert float((noisy - drawn[0]).std()) == pytest.approx(0.2, rel=0.02)
    assert torch.equal(noisy, shape_pictures(1000, noise=0.2)[0])


def test_default_sizes_balance_and_disjoint_parts() -> None:
    module = Shapes()
    assert [len(part) for part in module.parts] == [4000, 500, 2000]
    pictures = torch.cat([part.tensors[0] for part in module.parts])  # type: ignore[attr-defined]
    labels = torch.cat([part.tensors[1] for part in module.parts])  # type: ignore[attr-defined]
    assert len(pictures.flatten(1).unique(dim=0)) == 6500
    assert all(1200 < int(n) < 1400 for n in labels.bincount(minlength=5))
    again = Shapes(seed=3)
    assert torch.equal(again.parts.report.tensors[0], pictures[4500:])  # type: ignore[attr-defined]


@pytest.mark.parametrize("noise", [-0.1, math.nan, math.inf])
def test_impossible_noise_is_refused(noise: float) -> None:
    with pytest.raises(ConfigError, match="noise must be 0 or more"):
        Shapes(noise=noise)


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="report must be at least 1, not 0"):
        Shapes(report=0)
