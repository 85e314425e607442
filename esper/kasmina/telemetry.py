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
DEAD_VARIANCE = 1e-10
"""A feature whose variance over the samples is below this is dead."""


def chunk_ids(features: int, chunks: int) -> Tensor:
    """Return the chunk of each feature; chunks are equal but for the last, which takes the remainder.

    Example:
        >>> chunk_ids(5, 2).tolist()
        [0, 0, 1, 1, 1]
    """
    return (torch.arange(features) // (features // chunks)).clamp(max=chunks - 1)


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


def chunk_statistics(rows_NF: Tensor, ids_F: Tensor, chunks: int) -> Tensor:
    """Return [S, 4]: mean, variance, dead ratio and mean correlation inside each chunk.

    The mean correlation of k standardised features z is `(mean((sum z)^2) - k) / (k (k - 1))`, and 0 for k < 2.
    """
    counts = torch.zeros(chunks, device=rows_NF.device).index_add_(0, ids_F, torch.ones_like(ids_F, dtype=torch.float))
    variance_F, mean_F = torch.var_mean(rows_NF, dim=0, correction=0)
    dead_F = variance_F < DEAD_VARIANCE
    z_NF = (rows_NF - mean_F) * torch.where(dead_F, 0.0, variance_F.clamp_min(DEAD_VARIANCE).rsqrt())
    sums_NS = torch.zeros(len(rows_NF), chunks, device=rows_NF.device).index_add_(1, ids_F, z_NF)
    alive = _per_chunk((~dead_F).float(), ids_F, chunks)
    correlation = (sums_NS.square().mean(0) - alive) / (alive * (alive - 1)).clamp_min(1.0)
    return torch.stack(
        [
            _per_chunk(mean_F, ids_F, chunks) / counts,
            _per_chunk(variance_F, ids_F, chunks) / counts,
            _per_chunk(dead_F.float(), ids_F, chunks) / counts,
            torch.where(alive > 1, correlation, 0.0),
        ],
        dim=1,
    )


def chunk_gradient_norms(rows_NF: Tensor, ids_F: Tensor, chunks: int) -> Tensor:
    """Return [S]: Euclidean norm of the activation's gradient over each chunk."""
    return _per_chunk(rows_NF.square().sum(0), ids_F, chunks).sqrt()


def _per_chunk(values_F: Tensor, ids_F: Tensor, chunks: int) -> Tensor:
    return torch.zeros(chunks, device=values_F.device).index_add_(0, ids_F, values_F)
