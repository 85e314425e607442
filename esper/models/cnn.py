"""A small convolutional network: the host of the two vision tasks."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.leyline.errors import ConfigError
from esper.models.remembered import RememberedModule


class SmallCNN(RememberedModule):
    """3 x 3 convolutions with ReLU, one 2 x 2 max pool behind the first, a mean over the image, a linear head.

    Convolutions are `convs.0`, `convs.1`, ... and keep the size of the image; the head is `head`. A narrow one between
    wider ones makes one block with the next, `Sequential(convolution, ReLU, convolution)`, so that new channels can be
    put beside the narrow ones. The default has 3,822 parameters and reads digits.

    Args:
        widths: channels of the input and of each convolution, and classes of the head.

    Shapes:
        x: `[B, widths[0], H, W]`, H and W at least 2 -> `[B, widths[-1]]`.

    Raises:
        ConfigError: fewer than three widths, or a width below 1.

    Example:
        >>> SmallCNN(widths=(1, 4, 3))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(self, *, widths: Sequence[int] = (1, 16, 4, 16, 16, 10)) -> None:
        """Make the layers."""
        super().__init__()
        if len(widths) < 3 or min(widths) < 1:
            raise ConfigError(
                f"widths needs an input, a convolution and an output, each at least 1; given {tuple(widths)}."
            )
        self.widths = tuple(widths)
        self.convs = nn.ModuleList(_joined(self.widths[:-1]))
        self.head = nn.Linear(self.widths[-2], self.widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's values."""
        for number, conv in enumerate(self.convs):
            x = torch.relu(conv(x))
            if number == 0:
                x = F.max_pool2d(x, 2)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def _joined(channels: Sequence[int]) -> list[nn.Module]:
    """Make the convolutions, each one into a narrow width joined with the one out of it."""
    convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels)]
    blocks: list[nn.Module] = []
    index = 0
    while index < len(convs):
        narrow = index + 1 < len(convs) and channels[index + 1] < min(channels[index], channels[index + 2])
        blocks.append(nn.Sequential(convs[index], nn.ReLU(), convs[index + 1]) if narrow else convs[index])
        index += 2 if narrow else 1
    return blocks
