"""What sampled steps leave behind in a layer, and how it is put together many readings at a time.

On tensors this small a call costs more than its arithmetic. So a step only copies rows and takes norms; moments are
computed for many layers of one shape in one pass, and statistics of many readings in another.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from esper.kasmina import telemetry

_BATCH = 8
"""Most readings in one pass (they still fit a cache), and most that a layer keeps as they are."""


class Readings:
    """Readings of one layer that are not yet part of its health.

    Args:
        chunks: chunks S of the layer's features.

    Example:
        >>> readings = Readings(1)
        >>> readings.read_activation(torch.tensor([[1.0], [3.0]]), -1)
        >>> readings.take_statistics().tolist()
        [[2.0, 1.0, 0.0, 0.0]]
    """

    def __init__(self, chunks: int) -> None:
        """Start with none."""
        self.chunks = chunks
        self.rows: list[Tensor] = []
        self.moments: list[Tensor] = []
        self._features = 1
        self._statistics: list[Tensor] = []
        self._norms: list[Tensor] = []

    def read_activation(self, y: Tensor, dim: int) -> None:
        """Keep some rows of an activation."""
        self.rows.append(telemetry.sampled_rows(y, dim))
        self._features = y.shape[dim]
        if len(self.rows) >= _BATCH:
            digest([self])

    def read_gradient(self, grad: Tensor, dim: int) -> None:
        """Take the norms of an activation's gradient."""
        self._norms.append(telemetry.chunk_gradient_norms(grad, dim, self.chunks))
        if len(self._norms) >= _BATCH:
            self._norms = [torch.stack(self._norms).sum(0)]

    def fold(self, least: int = _BATCH) -> None:
        """Turn the moments into statistics once there are enough of them."""
        if len(self.moments) >= least:
            found = telemetry.statistics_of(torch.stack(self.moments), self._features).sum(0)
            self._statistics = [torch.stack([*self._statistics, found]).sum(0)]
            self.moments = []

    def take_statistics(self) -> Tensor | None:
        """Return the sum of the statistics of all activations read, [S, 4], and forget them."""
        digest([self])
        self.fold(1)
        found, self._statistics = self._statistics, []
        return found[0] if found else None

    def take_norms(self) -> Tensor | None:
        """Return the sum of the gradient norms, [S], and forget them."""
        found, self._norms = self._norms, []
        return torch.stack(found).sum(0) if found else None


@torch.no_grad()
def digest(layers: Iterable[Readings]) -> None:
    """Compute the moments of what the layers have read: those of one shape together."""
    alike: dict[tuple[object, ...], list[tuple[Readings, Tensor]]] = defaultdict(list)
    for readings in layers:
        for rows in readings.rows:
            alike[(readings.chunks, rows.shape, rows.device)].append((readings, rows))
        readings.rows = []
    for group in alike.values():
        for first in range(0, len(group), _BATCH):
            _digest_alike(group[first : first + _BATCH])


def _digest_alike(group: list[tuple[Readings, Tensor]]) -> None:
    moments_L4S = telemetry.chunk_moments(torch.stack([rows for _, rows in group]), group[0][0].chunks)
    for (readings, _), moments in zip(group, moments_L4S.unbind(), strict=True):
        readings.moments.append(moments)
        readings.fold()
