"""How far a network's inner representations have moved from where they were."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Drift(NamedTuple):
    """Mean of `1 - cos` over the positions of a probe batch, between then and now.

    Args:
        upstream: of what reaches the first place that may grow.
        downstream: of what reaches the head, behind all of them.
    """

    upstream: float
    downstream: float


def cosine_drift(then: Tensor, now: Tensor) -> float:
    """Return the mean of `1 - cos(then, now)` over all positions; what is equal bit for bit has none at all.

    Shapes:
        then, now: `[..., D]`.

    Example:
        >>> cosine_drift(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        0.5
    """
    if torch.equal(then, now):
        return 0.0
    return float((1 - F.cosine_similarity(then.double(), now.double(), dim=-1)).mean().clamp_min(0.0))


class Probe:
    """Remembers what a network made of a batch, and tells how far it has moved since.

    Args:
        network: runs the batch.
        upstream: module whose input is the upstream representation.
        downstream: module whose input is the downstream one.
        batch: the probe.
    """

    def __init__(self, network: nn.Module, upstream: nn.Module, downstream: nn.Module, batch: Tensor) -> None:
        """Read both once."""
        self.network, self.places, self.batch = network, (upstream, downstream), batch
        self.then = self._read()

    def drift(self) -> Drift:
        """Return how far both have moved."""
        return Drift(*(cosine_drift(then, now) for then, now in zip(self.then, self._read(), strict=True)))

    @torch.no_grad()
    def _read(self) -> list[Tensor]:
        seen: dict[nn.Module, Tensor] = {}
        hooks = [place.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]})) for place in self.places]
        was = self.network.training
        self.network.eval()(self.batch)
        self.network.train(was)
        for hook in hooks:
            hook.remove()
        return [seen[place].clone() for place in self.places]
