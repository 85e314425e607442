"""Health of a layer's chunks, computed on the device in one vectorised pass; `docs/telemetry.md` has every equation.

Shapes: N samples, F features, S chunks, L readings. Results have R rows: one per chunk, and behind several chunks one
for the whole site. With one chunk R is 1.
"""

import math
from types import MappingProxyType

import torch
from torch import Tensor

METRICS = (
    "chunk_mean",
    "chunk_variance",
    "dead_node_ratio",
    "avg_inter_node_correlation",
    "saturation",
    "gradient_norm",
    "gradient_norm_variance",
    "effective_rank",
    "growth_potential",
    "newborn_incumbent_ratio",
)
COLUMN = MappingProxyType({name: index for index, name in enumerate(METRICS)})
FORWARD_METRICS = METRICS[:5]
MAX_ROWS, MIN_ROWS = 128, 32
"""Most samples that one reading of a layer's statistics uses, and most in a layer too wide for `MAX_VALUES`."""
MAX_VALUES = 2**13
"""Most values of one reading, where that leaves `MIN_ROWS`."""
DEAD_VARIANCE = 1e-10
"""A feature whose variance over the samples is below this is dead."""
SATURATION_BAND = 0.01
"""A value is saturated when it is nearer to an end of its feature's range than this share of the range."""


def chunk_span(features: int, chunks: int, chunk: int) -> tuple[int, int]:
    """Return first feature and width of a chunk.

    Example:
        >>> chunk_span(5, 2, 1)
        (2, 3)
    """
    size = features // chunks
    start = chunk * size
    return start, (features - start if chunk == chunks - 1 else size)


def as_rows(y: Tensor, dim: int) -> Tensor:
    """Return [N, F] float32 with the feature dimension last."""
    return y.detach().movedim(dim, -1).reshape(-1, y.shape[dim]).float()


def sampled_rows(y: Tensor, dim: int) -> Tensor:
    """Return some rows of `as_rows(y, dim)`, evenly spread, as a copy.

    Their number is bounded by `MAX_ROWS`, `MIN_ROWS` and `MAX_VALUES`: means over that many samples are as good for
    health as those over all.
    """
    features = y.shape[dim]
    most = min(MAX_ROWS, max(MIN_ROWS, MAX_VALUES // features))
    if y.dim() == 4:
        each = math.ceil(math.sqrt(y.numel() / features / most)) or 1
        y = y[:, :, ::each, ::each]
    rows_NF = (y if dim == -1 else y.movedim(dim, -1)).reshape(-1, features)
    # A copy: the host may go on to change its activation in place, and what is kept must not keep the whole.
    spread = rows_NF.unfold(0, 1, math.ceil(len(rows_NF) / most) or 1)
    rows: Tensor = spread.squeeze(-1).to(torch.float32, copy=True)
    return rows


def chunk_statistics(rows_NF: Tensor, chunks: int) -> Tensor:
    """Return [R, 5]: mean, variance, dead ratio, mean correlation and saturation of each chunk.

    The mean correlation of k standardised features z is `(mean((sum z)^2) - k) / (k (k - 1))`, and 0 for k < 2.

    Example:
        >>> chunk_statistics(torch.tensor([[1.0, 1.0, 5.0, 5.0], [3.0, 3.0, 5.0, 5.0]]), 2)[:2].tolist()
        [[2.0, 1.0, 0.0, 1.0, 0.0], [5.0, 0.0, 1.0, 0.0, 0.0]]
    """
    return statistics_of(chunk_moments(rows_NF[None], chunks), rows_NF.shape[1])[0]


def chunk_moments(rows_LNF: Tensor, chunks: int) -> Tensor:
    """Return [L, 5, R]: the sums that the statistics of L readings are made of.

    Sums over a chunk's features of mean, variance, whether it is alive and its saturated share, and `mean((sum z)^2)`.
    """
    mean_LF = rows_LNF.mean(1)
    centred_LNF = rows_LNF - mean_LF[:, None]
    # Many times as fast on a CPU as `var_mean` along a dimension before the last.
    variance_LF = centred_LNF.square().mean(1)
    alive_LF = variance_LF >= DEAD_VARIANCE
    scale_LF = torch.where(alive_LF, variance_LF.rsqrt(), 0.0)
    sums_L4F = torch.stack([mean_LF, variance_LF, alive_LF.float(), _saturated(centred_LNF)], dim=1)
    # On a CPU faster than a product with a vector, and the same for any number of chunks.
    total_LNS = sum_chunks(centred_LNF.mul_(scale_LF[:, None]), chunks)
    return moments_of(sum_chunks(sums_L4F, chunks), total_LNS)


def _saturated(centred_LNF: Tensor) -> Tensor:
    """Return [L, F]: the share of the samples, but for the two extremes, at an end of the feature's range."""
    low_LF, high_LF = centred_LNF.amin(1), centred_LNF.amax(1)
    middle_LF, reach_LF = (low_LF + high_LF) / 2, (high_LF - low_LF) * (0.5 - SATURATION_BAND)
    # In place on floats: a tensor of bools takes longer to make, and to add up.
    count_LF = (centred_LNF - middle_LF[:, None]).abs_().ge_(reach_LF[:, None]).sum(1)
    return (count_LF - 2).clamp_min_(0.0) / max(centred_LNF.shape[1] - 2, 1)


def moments_of(sums_L4S: Tensor, total_LNS: Tensor) -> Tensor:
    """Return the moments of the chunks, and of the whole site, from their sums and each sample's `sum z`."""
    squares_L1R = with_whole(total_LNS).square().mean(1, keepdim=True)
    return torch.cat([with_whole(sums_L4S), squares_L1R], dim=1)


def statistics_of(moments: Tensor, features: int) -> Tensor:
    """Return [..., R, 5], the statistics of `chunk_statistics`, from moments [..., 5, R]."""
    mean, variance, alive, saturated, spread = moments.unbind(-2)
    rows = moments.shape[-1]
    count = with_whole(sum_chunks(moments.new_ones(features), max(1, rows - 1)))
    correlation = torch.where(alive > 1, (spread - alive) / (alive * (alive - 1)).clamp_min(1.0), 0.0)
    return torch.stack([mean / count, variance / count, 1.0 - alive / count, correlation, saturated / count], dim=-1)


def chunk_gradient_norms(grad: Tensor, dim: int, chunks: int) -> Tensor:
    """Return [R]: Euclidean norm of the activation's gradient over each chunk of its dimension `dim`."""
    if chunks == 1:
        norm: Tensor = torch.linalg.vector_norm(grad, dtype=torch.float32)
        return norm.reshape(1)
    return with_whole(sum_chunks(as_rows(grad, dim).square().sum(0), chunks)).sqrt()


def sum_chunks(values: Tensor, chunks: int) -> Tensor:
    """Return the sums over each chunk of the last dimension, [..., S] from [..., F].

    Chunks are equal but for the last, which takes the remainder.

    Example:
        >>> sum_chunks(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), 2).tolist()
        [3.0, 12.0]
    """
    if chunks == 1:
        return values.sum(-1, keepdim=True)
    size = values.shape[-1] // chunks
    equal, last = values.tensor_split([size * (chunks - 1)], dim=-1)
    return torch.cat([equal.reshape(*equal.shape[:-1], chunks - 1, size).sum(-1), last.sum(-1, keepdim=True)], dim=-1)


def with_whole(sums: Tensor) -> Tensor:
    """Return [..., R] from the sums of the chunks [..., S]: behind several chunks, that of the whole site.

    Example:
        >>> with_whole(torch.tensor([3.0, 12.0])).tolist(), with_whole(torch.tensor([3.0])).tolist()
        ([3.0, 12.0, 15.0], [3.0])
    """
    return sums if sums.shape[-1] == 1 else torch.cat([sums, sums.sum(-1, keepdim=True)], dim=-1)


def row_count(chunks: int) -> int:
    """Return R, the number of rows that a layer's health has.

    Example:
        >>> row_count(1), row_count(4)
        (1, 5)
    """
    return chunks if chunks == 1 else chunks + 1
