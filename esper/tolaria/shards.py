"""A rank's share of the data, without the samples that were only added to make the shares equal."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DistributedSampler


def unpadded(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield a loader's batches without the repeated samples at the end of a rank's share.

    A `DistributedSampler` repeats samples until every rank has equally many; measured twice, they would weigh twice.
    A batch that cannot be cut comes whole.
    """
    left = own_samples(loader)
    for batch in loader:
        if left is None:
            yield batch
            continue
        size = length(batch)
        if left <= 0:
            return
        yield batch if size <= left else first(batch, left)
        left -= size


def own_samples(loader: Any) -> int | None:
    """Return how many different samples a rank's share holds; None where every sample is its own."""
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    total = len(sampler.dataset)  # type: ignore[arg-type]
    return len(range(sampler.rank, total, sampler.num_replicas))


def length(batch: Any) -> int:
    """Return the length of a batch's first tensor, 1 if it has none.

    Example:
        >>> import torch
        >>> length((torch.zeros(3, 2), torch.zeros(3)))
        3
    """
    leaves, _ = tree_flatten(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)


def first(batch: Any, count: int) -> Any:
    """Return the first samples of a batch; one whose parts are not all of one length comes whole.

    Example:
        >>> import torch
        >>> first([torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])], 2)
        [tensor([1, 2]), tensor([4, 5])]
    """
    leaves, spec = tree_flatten(batch)
    sizes = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1 or not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        return batch
    return tree_unflatten([leaf[:count] for leaf in leaves], spec)
