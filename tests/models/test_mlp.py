"""The perceptron of tasks A and B."""

import pytest
import torch
from torch import nn

from esper.leyline.errors import ConfigError
from esper.models import MLP, parameter_count


@pytest.mark.parametrize(("widths", "expected"), [((2, 16, 3, 16, 16, 2), 469), ((64, 16, 4, 16, 16, 10), 1630)])
def test_parameter_counts_of_the_tasks(widths: tuple[int, ...], expected: int) -> None:
    assert parameter_count(MLP(widths=widths)) == expected


def test_a_narrow_layer_makes_a_block_with_the_next_and_the_last_is_bare() -> None:
    model = MLP(activation="tanh")
    kinds = [type(layer) for layer in model.layers]
    assert kinds == [nn.Linear, nn.Tanh, nn.Sequential, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert [type(layer) for layer in model.layers[2]] == [nn.Linear, nn.Tanh, nn.Linear]  # type: ignore[arg-type]


def test_the_blocks_compute_what_the_plain_chain_computes() -> None:
    model = MLP()
    chain = nn.Sequential(*[m for m in model.layers.modules() if not isinstance(m, nn.Sequential)])
    x = torch.randn(7, 2)
    assert torch.equal(model(x), chain(x))


def test_pictures_are_flattened() -> None:
    model = MLP(widths=(64, 4, 10))
    pictures = torch.rand(5, 1, 8, 8)
    assert torch.equal(model(pictures), model(pictures.flatten(1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (2,)}, "given \\(2,\\)"),
        ({"widths": (2, 0, 1)}, "each at least 1"),
        ({"activation": "rleu"}, "'rleu'; allowed: relu, gelu, silu, tanh"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MLP(**settings)  # type: ignore[arg-type]
