"""What a layer adds to its site's output: `y + sum_i alpha_i * r_i`, each residual on its own chunk."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Addition(NamedTuple):
    """What one child adds.

    Args:
        residual: what to add, of the shape of its chunk.
        alpha: factor before it, 0-dimensional; None for 1.
        start: first feature of the chunk.
        width: width of the chunk; None for the whole layer.
    """

    residual: Tensor
    alpha: Tensor | None
    start: int
    width: int | None

    def scaled(self) -> Tensor:
        """Return the residual times alpha, in the residual's own precision."""
        if self.alpha is None:
            return self.residual
        return torch.mul(self.residual, self.alpha.to(self.residual.dtype))


def blend_by_torch(y: Tensor, additions: Sequence[Addition], dim: int) -> Tensor:
    """Return `y + sum_i alpha_i * r_i` along the feature dimension `dim`, one addition after the other; y is kept.

    Example:
        >>> half = Addition(torch.ones(1, 1), torch.tensor(0.5), start=1, width=1)
        >>> blend_by_torch(torch.zeros(1, 2), [half], -1).tolist()
        [[0.0, 0.5]]
    """
    out, own = y, False
    for addition in additions:
        added = addition.scaled()
        if addition.width is None:
            out, own = out + added, True
            continue
        out, own = (out if own else out.clone()), True
        out.narrow(dim, addition.start, addition.width).add_(added)
    return out
