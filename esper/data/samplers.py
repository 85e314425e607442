"""Samplers whose order is a pure function of a seed and a place, so that a resumed run sees the same data.

None of them touches the global random state: each draw comes from a generator made for that draw alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from esper.leyline.errors import ConfigError

_MASK = (1 << 63) - 1


def generator_for(*keys: int) -> torch.Generator:
    """Return a fresh generator that depends on the keys and on nothing else.

    The keys are folded one by one with Knuth's 64-bit multiplicative step, so that neighbouring
    (seed, epoch) pairs start far apart.

    Args:
        keys: whole numbers, e.g. a seed and an epoch; their order matters.

    Example:
        >>> a, b = generator_for(0, 3), generator_for(0, 3)
        >>> torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))
        True
    """
    state = 0x9E3779B97F4A7C15
    for key in keys:
        state = ((state ^ (key & _MASK)) * 6364136223846793005 + 1442695040888963407) & ((1 << 64) - 1)
        state ^= state >> 29
    return torch.Generator().manual_seed(state & _MASK)


class ResumableSampler(Sampler[int], ABC):
    """A sampler that knows its epoch and its position, and can be put back at both.

    An iteration that runs to its end moves on to the next epoch by itself; `set_epoch` always wins.
    Starting anew without finishing gives the same epoch from its beginning; only `load_state_dict`
    makes the next iteration start in the middle, once.

    Args:
        seed: chooses the order.
    """

    def __init__(self, *, seed: int = 0) -> None:
        """Start at the beginning of epoch 0."""
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._resume_at = 0

    @abstractmethod
    def __len__(self) -> int:
        """Indices in one epoch."""

    @abstractmethod
    def order(self, epoch: int) -> list[int]:
        """Return every index of the epoch, in order; a pure function of the seed and the epoch."""

    def __iter__(self) -> Iterator[int]:
        """Yield the epoch's indices from where the last `load_state_dict` left off, else from the start."""
        epoch, start, self._resume_at = self.epoch, self._resume_at, 0
        for position, index in enumerate(self.order(epoch)[start:], start=start + 1):
            self.place(epoch, position)
            yield index
        self.place(epoch + 1, 0)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the present epoch keeps its position."""
        if epoch != self.epoch:
            self.place(epoch, 0)
            self._resume_at = 0

    def place(self, epoch: int, position: int) -> None:
        """Record how far the data have been used, without moving an iteration that is under way."""
        self.epoch, self.position = epoch, position

    def state_dict(self) -> dict[str, int]:
        """Return seed, epoch and position as plain numbers."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue, at the next iteration, after the last index that the saved run used.

        Raises:
            ConfigError: the state was saved with another seed, or its position is outside the epoch.
        """
        if state["seed"] != self.seed:
            raise ConfigError(
                f"The saved data order used seed {state['seed']}, this sampler has seed {self.seed}; "
                "give the same seed to resume, or start a new run."
            )
        if not 0 <= state["position"] <= len(self):
            raise ConfigError(f"Saved position {state['position']} is outside an epoch of {len(self)} indices.")
        self.place(state["epoch"], state["position"])
        self._resume_at = state["position"]


class SeededSampler(ResumableSampler):
    """A new permutation of `range(size)` in every epoch.

    Args:
        size: number of examples.
        seed: chooses the permutations.

    Example:
        >>> sampler = SeededSampler(5, seed=1)
        >>> first, second = list(sampler), list(sampler)
        >>> sorted(first) == sorted(second) == [0, 1, 2, 3, 4], first == sampler.order(0)
        (True, True)
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        """Remember the size."""
        super().__init__(seed=seed)
        self.size = size

    def __len__(self) -> int:
        """Indices in one epoch: all of them."""
        return self.size

    def order(self, epoch: int) -> list[int]:
        """Return the epoch's permutation."""
        return list(map(int, torch.randperm(self.size, generator=generator_for(self.seed, epoch)).tolist()))


class StepSampler(ResumableSampler):
    """Random draws with replacement, by training step: batch `s` is the same however long an epoch is.

    Args:
        size: indices are drawn from `range(size)`.
        batch_size: draws in one step.
        steps: steps in one epoch.
        seed: chooses the draws.

    Example:
        >>> short, long = (StepSampler(1000, batch_size=2, steps=s, seed=3) for s in (2, 4))
        >>> list(short) + list(short) == list(long)
        True
    """

    def __init__(self, size: int, *, batch_size: int, steps: int, seed: int = 0) -> None:
        """Remember the sizes."""
        super().__init__(seed=seed)
        self.size, self.batch_size, self.steps = size, batch_size, steps

    def __len__(self) -> int:
        """Draws in one epoch."""
        return self.batch_size * self.steps

    def order(self, epoch: int) -> list[int]:
        """Return the draws of the epoch's steps, one after the other."""
        first = epoch * self.steps
        return [index for step in range(first, first + self.steps) for index in self._draw(step)]

    def _draw(self, step: int) -> list[int]:
        draws = torch.randint(self.size, (self.batch_size,), generator=generator_for(self.seed, step))
        return list(map(int, draws.tolist()))
