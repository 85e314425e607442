"""The dearer signals of health: how many directions a chunk uses, and what another unit there could learn.

Both come from products of a batch's rows with each other, so no spectrum is ever computed.

Shapes: L readings of N samples and F features; results [L, R] have rows as in `esper.kasmina.telemetry`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from esper.kasmina.telemetry import DEAD_VARIANCE


def effective_ranks(rows_LNF: Tensor, chunks: int) -> Tensor:
    """Return [L, R]: the effective rank of the covariance of each chunk's features.

    `(sum_i e_i)^2 / sum_i e_i^2 = tr(C)^2 / |C|_F^2` with the eigenvalues e of the covariance C: the exponential of the
    Renyi entropy of order 2 of the normalised spectrum, also called participation ratio. It is the number of equally
    strong directions with that entropy: 0 for a dead chunk, else from 1 to `min(N - 1, width)`.

    Example:
        >>> round(effective_ranks(torch.tensor([[[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]]), 1).item(), 4)
        2.0
    """
    centred_LNF = rows_LNF - rows_LNF.mean(1, keepdim=True)
    with torch.autocast(rows_LNF.device.type, enabled=False):
        return torch.cat([_participation(part_LPNK) for part_LPNK in _parts(centred_LNF, chunks)], dim=1)


def _participation(part_LPNK: Tensor) -> Tensor:
    samples, width = part_LPNK.shape[-2:]
    products = _gram(part_LPNK if samples <= width else part_LPNK.mT)
    trace = _diagonal(products).sum(-1)
    # Divided before it is squared, which could overflow.
    spread = (products / trace[..., None, None]).square_().sum((-2, -1))
    return torch.where(trace >= samples * DEAD_VARIANCE, spread.reciprocal(), 0.0)


def growth_potentials(rows_LNF: Tensor, grads_LNF: Tensor, chunks: int, total: int) -> Tensor:
    """Return [L, R]: the squared norm of the gradient that new units would receive, per chunk.

    `|sum_n g_n y_n^T|_F^2` over the samples n of the batch, with the activation y and the loss's gradient g on it: the
    gradient of a zero linear map from the chunk's output back into it. It is what GradMax (Evci et al. 2022, "GradMax:
    Growing Neural Networks using Gradient Information") maximises over the incoming weights of new units, summed over
    all orthogonal units, and needs no further pass. Where only N of `total` samples were kept, it is the unbiased
    estimate from the pairs of those, `M/N D + M(M-1)/(N(N-1)) (|sum_n g_n y_n^T|_F^2 - D)` with M samples in all and
    `D = sum_n |g_n|^2 |y_n|^2`; a single estimate may then be negative.

    Example:
        >>> growth_potentials(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [1.0]]]), 1, total=2).item()
        25.0
    """
    kept = rows_LNF.shape[1]
    single, paired = total / kept, total * (total - 1) / max(1, kept * (kept - 1))
    found = []
    with torch.autocast(rows_LNF.device.type, enabled=False):
        for y_LPNK, g_LPNK in zip(_parts(rows_LNF, chunks), _parts(grads_LNF, chunks), strict=True):
            whole, own = _alignment(y_LPNK, g_LPNK)
            found.append(single * own + paired * (whole - own))
    return torch.cat(found, dim=1)


def _alignment(y_LPNK: Tensor, g_LPNK: Tensor) -> tuple[Tensor, Tensor]:
    """Return `|sum_n g_n y_n^T|_F^2`, also `sum_nm (y_n . y_m) (g_n . g_m)`, and the part of it with n = m.

    Whichever is less work is done.
    """
    samples, width = y_LPNK.shape[-2:]
    if width > 2 * samples:
        products = _gram(y_LPNK).mul_(_gram(g_LPNK))
        return products.sum((-2, -1)), _diagonal(products).sum(-1)
    own = (y_LPNK.square().sum(-1) * g_LPNK.square().sum(-1)).sum(-1)
    return (g_LPNK.mT @ y_LPNK).square_().sum((-2, -1)), own


def _gram(x: Tensor) -> Tensor:
    return x @ x.mT


def _diagonal(square: Tensor) -> Tensor:
    return square.diagonal(dim1=-2, dim2=-1)


def _parts(values_LNF: Tensor, chunks: int) -> Iterator[Tensor]:
    """Yield [L, P, N, K]: P parts of K features each; together the parts are the rows of health, in order."""
    size = values_LNF.shape[-1] // chunks
    if chunks > 1:
        equal, last = values_LNF.tensor_split([size * (chunks - 1)], dim=-1)
        yield equal.reshape(*equal.shape[:-1], chunks - 1, size).transpose(1, 2)
        yield last[:, None]
    yield values_LNF[:, None]
