"""Health of a layer's chunks, computed on the device in one vectorised pass.

Shapes: y is [N, F] after flattening (N samples, F features); results are [S], one row per chunk.
"""

from types import MappingProxyType

import torch
from torch import Tensor

METRICS = (
    "chunk_mean",
    "chunk_variance",
    "dead_node_ratio",
    "avg_inter_node_correlation",
    "gradient_norm",
    "newborn_incumbent_ratio",
)
COLUMN = MappingProxyType({name: index for index, name in enumerate(METRICS)})
FORWARD_METRICS = METRICS[:4]
MAX_ROWS = 512
"""Most samples that one reading of a layer's statistics uses."""
DEAD_VARIANCE = 1e-10
"""A feature whose variance over the samples is below this is dead."""


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


def thinned(rows_NF: Tensor) -> Tensor:
    """Return at most `MAX_ROWS` rows, evenly spread: moments of a few hundred samples are as good for health."""
    return rows_NF[:: -(-len(rows_NF) // MAX_ROWS)]


def chunk_statistics(rows_NF: Tensor, chunks: int) -> Tensor:
    """Return [S, 4]: mean, variance, dead ratio and mean correlation inside each chunk.

    The mean correlation of k standardised features z is `(mean((sum z)^2) - k) / (k (k - 1))`, and 0 for k < 2.

    Example:
        >>> chunk_statistics(torch.tensor([[1.0, 1.0, 5.0, 5.0], [3.0, 3.0, 5.0, 5.0]]), 2).tolist()
        [[2.0, 1.0, 0.0, 1.0], [5.0, 0.0, 1.0, 0.0]]
    """
    mean_F = rows_NF.mean(0)
    centred_NF = rows_NF - mean_F
    # Twice as fast on a CPU as `var_mean` along the first dimension.
    variance_F = centred_NF.square().mean(0)
    alive_F = variance_F >= DEAD_VARIANCE
    z_NF = centred_NF.mul_(torch.where(alive_F, variance_F.clamp_min(DEAD_VARIANCE).rsqrt(), 0.0))
    columns_4F = torch.stack([mean_F, variance_F, alive_F.float(), torch.ones_like(mean_F)])
    mean, variance, alive, count = sum_chunks(columns_4F, chunks)
    correlation = (sum_chunks(z_NF, chunks).square().mean(0) - alive) / (alive * (alive - 1)).clamp_min(1.0)
    return torch.stack(
        [mean / count, variance / count, 1.0 - alive / count, torch.where(alive > 1, correlation, 0.0)], dim=1
    )


def chunk_gradient_norms(rows_NF: Tensor, chunks: int) -> Tensor:
    """Return [S]: Euclidean norm of the activation's gradient over each chunk."""
    return sum_chunks(rows_NF.square().sum(0), chunks).sqrt()


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
