"""The small convolutional network of the vision tasks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esper.leyline.errors import ConfigError
from esper.models import SmallCNN, parameter_count


@pytest.mark.parametrize(
    ("widths", "expected"),
    [((1, 16, 4, 16, 16, 10), 3822), ((1, 16, 8, 16, 16, 10), 4978), ((1, 16, 4, 16, 16, 5), 3737)],
)
def test_parameter_counts_of_the_tasks(widths: tuple[int, ...], expected: int) -> None:
    assert parameter_count(SmallCNN(widths=widths)) == expected


def test_a_narrow_layer_makes_a_block_with_the_next() -> None:
    kinds = [type(layer) for layer in SmallCNN().convs]
    assert kinds == [nn.Conv2d, nn.Sequential, nn.Conv2d]
    assert [type(layer) for layer in SmallCNN(widths=(3, 8, 8, 5)).convs] == [nn.Conv2d, nn.Conv2d]


def test_it_computes_what_its_docstring_says() -> None:
    model, x = SmallCNN(), torch.randn(7, 1, 8, 8)
    first, second, third, fourth = (m for m in model.convs.modules() if isinstance(m, nn.Conv2d))
    y = F.max_pool2d(first(x).relu(), 2)
    y = fourth(third(second(y).relu()).relu()).relu()
    assert torch.equal(model(x), model.head(y.mean((2, 3))))


def test_blocks_behind_the_pool_keep_the_size_of_the_image() -> None:
    model, seen = SmallCNN(), []
    for conv in model.convs:
        conv.register_forward_hook(lambda _, given, out: seen.append((given[0].shape[2:], out.shape[2:])))
    model(torch.randn(2, 1, 16, 16))
    assert seen == [((16, 16), (16, 16)), ((8, 8), (8, 8)), ((8, 8), (8, 8))]


def test_it_remembers_how_it_was_made() -> None:
    assert SmallCNN(widths=(1, 4, 2)).arguments == {"widths": (1, 4, 2)}


@pytest.mark.parametrize("widths", [(), (1, 10), (1, 0, 10)])
def test_wrong_widths(widths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="an input, a convolution and an output, each at least 1; given"):
        SmallCNN(widths=widths)
