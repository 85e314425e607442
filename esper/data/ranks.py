"""One process's share of a resumable order."""

from typing import Any, final

from torch.utils.data import DistributedSampler

from esper.data.samplers import ResumableSampler
from esper.leyline.errors import ConfigError, DataError


@final
class RankSampler(ResumableSampler, DistributedSampler[Any]):
    """Gives each of several processes every n-th index of another sampler's order.

    The shares are disjoint and equally long; what is left over at the end of an epoch waits for another epoch. Being a
    `DistributedSampler`, it is left as it is by a trainer that would otherwise put its own in place.

    Args:
        sampler: the order to share.
        rank: this process, from 0.
        size: number of processes.

    Raises:
        ConfigError: the rank is not one of the processes.
        DataError: an epoch has fewer indices than there are processes.

    Example:
        >>> from esper.data import StepSampler
        >>> whole = StepSampler(100, batch_size=2, steps=3)
        >>> shares = [list(RankSampler(whole, rank=r, size=2)) for r in range(2)]
        >>> [i for pair in zip(*shares) for i in pair] == whole.order(0)
        True
    """

    def __init__(self, sampler: ResumableSampler, *, rank: int, size: int) -> None:
        """Remember the share."""
        if not 0 <= rank < size:
            raise ConfigError(f"rank={rank} must be from 0 to {size - 1}, the number of processes less one.")
        if len(sampler) < size:
            raise DataError(f"an epoch of {len(sampler)} examples cannot be shared by {size} processes; use fewer.")
        super().__init__(seed=sampler.seed)
        self.whole, self.rank, self.num_replicas, self.drop_last = sampler, rank, size, True

    def __len__(self) -> int:
        """Indices of one process in one epoch."""
        return len(self.whole) // self.num_replicas

    def order(self, epoch: int) -> list[int]:
        """Return this process's indices of the epoch."""
        return self.whole.order(epoch)[self.rank : len(self) * self.num_replicas : self.num_replicas]
