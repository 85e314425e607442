"""A plain multi-layer perceptron: the host of tasks A (spirals) and B (digits)."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

from torch import Tensor, nn

from esper.leyline.errors import ConfigError
from esper.models.remembered import RememberedModule

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
)


class MLP(RememberedModule):
    """Linear layers with an activation between them; inputs are flattened.

    Layers sit at the even places: `layers.0`, `layers.2`, ... A narrow hidden layer between wider ones makes one block
    with the layer behind it, `Sequential(linear, activation, linear)`, so that new units can be put beside the narrow
    ones. The default (task A) has 469 parameters; `widths=(64, 16, 4, 16, 16, 10)` (task B) has 1,630.

    Args:
        widths: units of the input, of each hidden layer, and of the output.
        activation: `relu`, `gelu`, `silu` or `tanh`.

    Shapes:
        x: `[B, ...]` with `widths[0]` numbers per example -> `[B, widths[-1]]`.

    Raises:
        ConfigError: fewer than two widths, a width below 1, or an unknown activation.

    Example:
        >>> import torch
        >>> MLP(widths=(2, 4, 3))(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(self, *, widths: Sequence[int] = (2, 16, 3, 16, 16, 2), activation: str = "relu") -> None:
        """Make the layers."""
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ConfigError(f"widths needs an input and an output, each at least 1; given {tuple(widths)}.")
        if activation not in ACTIVATIONS:
            raise ConfigError(f"Unknown activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}.")
        self.widths = tuple(widths)
        make = ACTIVATIONS[activation]
        blocks = _joined([nn.Linear(a, b) for a, b in pairwise(widths)], self.widths, make)
        self.layers = nn.Sequential(*[part for block in blocks for part in (block, make())][:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the output layer's values."""
        out: Tensor = self.layers(x.flatten(1))
        return out


def _joined(
    linears: Sequence[nn.Linear], widths: Sequence[int], make: Callable[[], nn.Module]
) -> list[nn.Linear | nn.Sequential]:
    """Join each linear layer into a narrow width with the one out of it, where that one leads to a hidden layer."""
    blocks: list[nn.Linear | nn.Sequential] = []
    index = 0
    while index < len(linears):
        narrow = index + 2 < len(linears) and widths[index + 1] < min(widths[index], widths[index + 2])
        blocks.append(nn.Sequential(linears[index], make(), linears[index + 1]) if narrow else linears[index])
        index += 2 if narrow else 1
    return blocks
