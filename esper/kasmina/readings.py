"""What sampled steps leave behind in a layer, and how it is put together for many layers at a time.

On tensors this small a call costs more than its arithmetic. So a step only copies rows and takes norms; what they tell
is computed for many layers of one shape in one pass, and so are the sums at a boundary.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.kasmina import fused, spectrum, telemetry

_BATCH = 8
"""Most readings in one pass (they still fit a cache), and most that a layer keeps as they are."""

ONCE = ("gradient_norm_variance", "effective_rank", "growth_potential")
"""Metrics of which a boundary sees one value, whatever the number of readings."""

Kept = list[Any]
"""What is kept of one activation: its rows, those of its gradient or None, how many samples there were in all, and
whether statistics and effective rank are still to be taken. A list, because a checkpoint keeps plain data."""


class Readings:
    """Readings of one layer that are not yet part of its health.

    Args:
        chunks: chunks S of the layer's features.

    Example:
        >>> readings = Readings(1)
        >>> _ = readings.read_activation(torch.tensor([[1.0], [3.0]]), -1)
        >>> digest([readings])
        >>> readings.statistics[0].tolist()
        [[2.0, 1.0, 0.0, 0.0, 0.0]]
    """

    def __init__(self, chunks: int) -> None:
        """Start with none. Every attribute is plain data."""
        self.chunks = chunks
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.kept: list[Kept] = []
        self.statistics: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.norms_before: list[Tensor] = []
        self.ranks: list[Tensor] = []
        self.growth: list[Tensor] = []
        self.normed = self.ranked = self.grown = 0

    def read_activation(self, y: Tensor, dim: int, *, fully: bool = False) -> Kept:
        """Keep some rows of an activation, and return what is kept; read `fully`, its effective rank counts too."""
        kept = [telemetry.sampled_rows(y, dim), None, 0, True, fully]
        self.kept.append(kept)
        if len(self.kept) >= _BATCH:
            digest([self])
        return kept

    def read_gradient(self, grad: Tensor, dim: int, kept: Kept | None = None) -> None:
        """Take the norms of an activation's gradient; with what is kept of that, the growth potential counts too."""
        self.norms.append(telemetry.chunk_gradient_norms(grad, dim, self.chunks))
        if len(self.norms) >= _BATCH:
            mean_LR, squares_LR = _merged([self])
            self.normed, self.norms, self.norms_before = self.normed + _BATCH, [], [mean_LR[0], squares_LR[0]]
        if kept is not None:
            kept[1], kept[2] = telemetry.sampled_rows(grad, dim), grad.numel() // grad.shape[dim]
            if not any(one is kept for one in self.kept):
                self.kept.append(kept)

    def add_statistics(self, statistics_R5: Tensor) -> None:
        """Add the statistics of one reading."""
        self.statistics = _shortened([*self.statistics, statistics_R5])

    def add_ranks(self, ranks_R: Tensor) -> None:
        """Add the effective ranks of one reading."""
        self.ranked, self.ranks = self.ranked + 1, _shortened([*self.ranks, ranks_R])

    def add_growth(self, squares_R: Tensor) -> None:
        """Add the squared growth potentials of one reading."""
        self.grown, self.growth = self.grown + 1, _shortened([*self.growth, squares_R])

    @property
    def alike(self) -> tuple[int, ...]:
        """What layers have in common that are summed up in one pass."""
        lists = (self.statistics, self.norms, self.norms_before, self.ranks, self.growth)
        return self.chunks, self.normed, self.ranked, self.grown, *map(len, lists)


def read_again(y: Tensor, dim: int) -> Kept:
    """Keep rows of an activation that is computed a second time, for its gradient only."""
    return [telemetry.sampled_rows(y, dim), None, 0, False, False]


@torch.no_grad()
def digest(layers: Iterable[Readings]) -> None:
    """Work on what the layers have read: what is alike together, and while it is at hand."""
    alike: dict[tuple[object, ...], list[tuple[Readings, Kept]]] = defaultdict(list)
    for readings in layers:
        for kept in readings.kept:
            rows, grads, *rest = kept
            alike[(readings.chunks, rows.shape, rows.device, grads is None, *rest)].append((readings, kept))
        readings.kept = []
    for group in alike.values():
        for first in range(0, len(group), _BATCH):
            _digest_alike(group[first : first + _BATCH])


def _digest_alike(group: list[tuple[Readings, Kept]]) -> None:
    chunks, (_, grads, total, statistics, rank) = group[0][0].chunks, group[0][1]
    rows_LNF = torch.stack([kept[0] for _, kept in group])
    if statistics:
        moments_L5R = fused.chunk_moments(rows_LNF, chunks)
        _hand_out(group, Readings.add_statistics, telemetry.statistics_of(moments_L5R, rows_LNF.shape[2]))
    if rank:
        _hand_out(group, Readings.add_ranks, spectrum.effective_ranks(rows_LNF, chunks))
    if grads is not None:
        grads_LNF = torch.stack([kept[1] for _, kept in group])
        _hand_out(group, Readings.add_growth, spectrum.growth_potentials(rows_LNF, grads_LNF, chunks, total))
    for _, kept in group:
        # A gradient may still come.
        kept[1], kept[3], kept[4] = None, False, False


def _hand_out(group: list[tuple[Readings, Kept]], add: Callable[[Readings, Tensor], None], found: Tensor) -> None:
    for (readings, _), values in zip(group, found.unbind(), strict=True):
        add(readings, values)


@torch.no_grad()
def summed_up(layers: Sequence[Readings]) -> dict[str, Tensor]:
    """Return what layers that are `alike` have read, [L, R] by metric, and forget it.

    Of the statistics and the gradient norm the sum over the readings, of the metrics in `ONCE` one value for all.
    """
    first = layers[0]
    found: dict[str, Tensor] = {}
    if first.statistics:
        found |= zip(telemetry.FORWARD_METRICS, _sums([x.statistics for x in layers]).unbind(-1), strict=True)
    if count := first.normed + len(first.norms):
        mean_LR, squares_LR = _merged(layers)
        found |= {"gradient_norm": mean_LR * count, "gradient_norm_variance": squares_LR / count}
    if first.ranked:
        found["effective_rank"] = _sums([x.ranks for x in layers]) / first.ranked
    if first.grown:
        found["growth_potential"] = (_sums([x.growth for x in layers]) / first.grown).clamp_min(0.0).sqrt()
    for readings in layers:
        readings.forget()
    return found


def _sums(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the sum of each list; all are of one length."""
    stacked = torch.stack([value for values in lists for value in values])
    return stacked.reshape(len(lists), -1, *stacked.shape[1:]).sum(1)


def _merged(layers: Sequence[Readings]) -> tuple[Tensor, Tensor]:
    """Return mean and summed squared deviation of the gradient norms, [L, R] each (Chan et al. 1983)."""
    before, new = layers[0].normed, len(layers[0].norms)
    if new == 0:
        mean_LR, squares_LR = (torch.stack(each) for each in zip(*(x.norms_before for x in layers), strict=True))
        return mean_LR, squares_LR
    norms_LBR = torch.stack([norm for x in layers for norm in x.norms]).reshape(len(layers), new, -1)
    mean_LR = norms_LBR.mean(1)
    squares_LR = (norms_LBR - mean_LR[:, None]).square().sum(1)
    if before == 0:
        return mean_LR, squares_LR
    old_LR, old_squares_LR = (torch.stack(each) for each in zip(*(x.norms_before for x in layers), strict=True))
    gap_LR, whole = mean_LR - old_LR, before + new
    squares_LR = old_squares_LR + squares_LR + gap_LR.square() * (before * new / whole)
    return old_LR + gap_LR * (new / whole), squares_LR


def _shortened(found: list[Tensor]) -> list[Tensor]:
    return found if len(found) < _BATCH else [torch.stack(found).sum(0)]
