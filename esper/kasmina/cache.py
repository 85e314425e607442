"""A cache of ready kernels, bounded by bytes: a fixed bound, and a lower one while memory is scarce."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Final, NamedTuple, final

import psutil
import torch

from esper.kasmina.kernels import Kernel, KernelRequest

SHARE: Final = 0.1
"""Share of the memory that would be free without it, which a cache may take."""


class CacheCounts(NamedTuple):
    """What a cache holds, and what it was asked for, at one instant.

    Args:
        hits: lookups that found their kernel.
        misses: lookups that did not.
        evictions: kernels that had to leave for want of room.
        kernels: kernels that are held.
        nbytes: what they take, in bytes.
        limit: what they might take when that was last looked at, in bytes.
    """

    hits: int
    misses: int
    evictions: int
    kernels: int
    nbytes: int
    limit: int

    @property
    def hit_rate(self) -> float:
        """Share of the lookups that found their kernel, 0 to 1; 1 before the first.

        Example:
            >>> CacheCounts(hits=3, misses=1, evictions=0, kernels=1, nbytes=9, limit=99).hit_rate
            0.75
        """
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else 1.0


def free_memory(device: str | torch.device = "cpu") -> int:
    """Return how much memory is free at this instant, in bytes: of the device for CUDA, else of the machine.

    Example:
        >>> free_memory() > 0
        True
    """
    chosen = torch.device(device)
    if chosen.type == "cuda":
        return torch.cuda.mem_get_info(chosen)[0]
    return int(psutil.virtual_memory().available)


def soft_limit(most: int, held: int, free: int) -> int:
    """Return how many bytes a cache may hold: a tenth of what would be free without it, and never more than `most`.

    What it gives up becomes free, so the limit does not move because the cache follows it.

    Example:
        >>> soft_limit(256, held=50, free=950), soft_limit(256, held=50, free=9950), soft_limit(256, held=0, free=0)
        (100, 256, 0)
    """
    return min(most, int(SHARE * (held + free)))


@final
class KernelCache:
    """Least recently used kernels leave first; the bound is on bytes, never on the count.

    A kernel larger than the whole cache is held alone: a request must be answerable.

    Args:
        max_bytes: bound on the sum of `Kernel.nbytes`.
        free: returns the free memory of where the kernels are, in bytes; see `soft_limit`. It is read when a kernel
            comes, and by `shrink`; a lookup reads nothing.
    """

    def __init__(self, max_bytes: int = 256 * 2**20, *, free: Callable[[], int] = free_memory) -> None:
        """Start empty."""
        self.max_bytes, self._free = max_bytes, free
        self.nbytes = 0
        self._hits = 0
        self._misses = 0
        self._evictions = 0
        self._limit = max_bytes
        self._kernels: OrderedDict[KernelRequest, Kernel] = OrderedDict()
        self._lock = Lock()

    def get(self, request: KernelRequest) -> Kernel | None:
        """Return the kernel and mark it as used, or None."""
        with self._lock:
            kernel = self._kernels.get(request)
            if kernel is None:
                self._misses += 1
                return None
            self._hits += 1
            self._kernels.move_to_end(request)
            return kernel

    def put(self, request: KernelRequest, kernel: Kernel) -> None:
        """Insert a kernel and drop the least recently used ones over the bound."""
        free = self._free()
        with self._lock:
            self._drop(request)
            self._kernels[request] = kernel
            self.nbytes += kernel.nbytes
            self._keep_within(free)

    def shrink(self) -> int:
        """Drop what the free memory has no room for any more, least recently used first; return how many kernels."""
        free = self._free()
        with self._lock:
            before = self._evictions
            self._keep_within(free)
            return self._evictions - before

    def evict(self, kernel_id: str) -> None:
        """Drop every entry of this kernel."""
        with self._lock:
            for request in [r for r, k in self._kernels.items() if k.kernel_id == kernel_id]:
                self._drop(request)

    def counts(self) -> CacheCounts:
        """Return what it holds and what it was asked for so far."""
        with self._lock:
            held = len(self._kernels)
            return CacheCounts(self._hits, self._misses, self._evictions, held, self.nbytes, self._limit)

    def __contains__(self, request: object) -> bool:
        """Tell whether the kernel is held, without counting a hit or a miss."""
        return request in self._kernels

    def __len__(self) -> int:
        """Return the number of kernels held."""
        return len(self._kernels)

    def _keep_within(self, free: int) -> None:
        self._limit = soft_limit(self.max_bytes, self.nbytes, free)
        while self.nbytes > self._limit and len(self._kernels) > 1:
            self._drop(next(iter(self._kernels)))
            self._evictions += 1

    def _drop(self, request: KernelRequest) -> None:
        kernel = self._kernels.pop(request, None)
        if kernel is not None:
            self.nbytes -= kernel.nbytes
