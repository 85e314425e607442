"""A cache of ready kernels, bounded by bytes."""

from collections import OrderedDict
from threading import Lock

from esper.kasmina.kernels import Kernel, KernelRequest


class KernelCache:
    """Least recently used kernels leave first; the bound is on bytes, never on the count.

    A kernel larger than the whole cache is held alone: a request must be answerable.

    Args:
        max_bytes: bound on the sum of `Kernel.nbytes`.
    """

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        """Start empty."""
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._kernels: OrderedDict[KernelRequest, Kernel] = OrderedDict()
        self._lock = Lock()

    def get(self, request: KernelRequest) -> Kernel | None:
        """Return the kernel and mark it as used, or None."""
        with self._lock:
            kernel = self._kernels.get(request)
            if kernel is None:
                self.misses += 1
                return None
            self.hits += 1
            self._kernels.move_to_end(request)
            return kernel

    def put(self, request: KernelRequest, kernel: Kernel) -> None:
        """Insert a kernel and drop the least recently used ones over the bound."""
        with self._lock:
            self._drop(request)
            self._kernels[request] = kernel
            self.nbytes += kernel.nbytes
            while self.nbytes > self.max_bytes and len(self._kernels) > 1:
                self._drop(next(iter(self._kernels)))

    def evict(self, kernel_id: str) -> None:
        """Drop every entry of this kernel."""
        with self._lock:
            for request in [r for r, k in self._kernels.items() if k.kernel_id == kernel_id]:
                self._drop(request)

    def __contains__(self, request: object) -> bool:
        """Tell whether the kernel is held, without counting a hit or a miss."""
        return request in self._kernels

    def __len__(self) -> int:
        """Return the number of kernels held."""
        return len(self._kernels)

    def _drop(self, request: KernelRequest) -> None:
        kernel = self._kernels.pop(request, None)
        if kernel is not None:
            self.nbytes -= kernel.nbytes
