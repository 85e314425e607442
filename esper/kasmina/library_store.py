"""The fast tier: kernels built from the blueprint library on a background thread."""

import hashlib
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import final

import torch

from esper.blueprints import BlueprintIR, Library, SiteShape, build, cost, load_library, why_not
from esper.kasmina.cache import KernelCache
from esper.kasmina.kernels import Kernel, KernelRequest, KernelStore
from esper.leyline.errors import KernelError

_TOOLCHAIN = hashlib.sha256(f"torch-{torch.__version__}".encode()).hexdigest()[:12]
_WARM_UP_SAMPLES = 2
_log = logging.getLogger(__name__)

_BUILDING = threading.RLock()
"""Held during a build: a loader's worker forked meanwhile would inherit torch's locks as the build held them."""

os.register_at_fork(before=_BUILDING.acquire, after_in_parent=_BUILDING.release, after_in_child=_BUILDING.release)


@final
class LibraryKernelStore(KernelStore):
    """Builds eager children from the library; verification and warm-up run off the training thread.

    Args:
        library: blueprints; None loads the shipped library.
        cache: ready kernels; None makes a cache of the default size.
        patience_s: longest wait for a build that is under way, in seconds.
    """

    def __init__(
        self, library: Library | None = None, cache: KernelCache | None = None, *, patience_s: float = 10.0
    ) -> None:
        """Start nothing yet: the background thread is made with the first build."""
        self.patience_s = patience_s
        self.library = library if library is not None else load_library()
        self.cache = cache if cache is not None else KernelCache()
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: dict[KernelRequest, Future[Kernel]] = {}
        self._failed: dict[KernelRequest, KernelError] = {}
        self._banned: set[str] = set()

    def prefetch(self, request: KernelRequest) -> None:
        """Queue the build unless it is ready, under way, or has failed."""
        if not (request in self._under_way or request in self._failed or request in self.cache):
            if self._pool is None:
                self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="esper-kernels")
            self._under_way[request] = self._pool.submit(self._ingest, request)

    def poll(self, request: KernelRequest) -> Kernel | None:
        """Return the kernel; start it if nobody did, and wait for it for `patience_s` at most."""
        if request in self._failed:
            raise self._failed[request]
        kernel = self.cache.get(request)
        return kernel if kernel is not None else self._collect(request)

    def _collect(self, request: KernelRequest) -> Kernel | None:
        self.prefetch(request)
        future = self._under_way[request]
        # An eager build takes milliseconds. Waiting for it at a boundary keeps a run the same however busy the machine.
        done, _ = wait([future], timeout=self.patience_s)
        if not done:
            _log.warning("the build of %s took over %s s; its seed waits.", request.blueprint, self.patience_s)
            return None
        del self._under_way[request]
        try:
            kernel = future.result(timeout=0)
            if kernel.kernel_id in self._banned:
                raise KernelError(f"kernel {kernel.kernel_id} failed in this run and is not offered again")
        except Exception as error:
            self._failed[request] = KernelError(f"{request.blueprint} cannot be had: {error}")
            raise self._failed[request] from error
        self.cache.put(request, kernel)
        return kernel

    def evict(self, kernel_id: str) -> None:
        """Drop the kernel and refuse it from now on."""
        self._banned.add(kernel_id)
        self.cache.evict(kernel_id)

    def close(self) -> None:
        """Stop the background thread; queued builds are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None
        self._under_way = {r: f for r, f in self._under_way.items() if not f.cancelled()}

    def _ingest(self, request: KernelRequest) -> Kernel:
        with _BUILDING:
            return self._built(request)

    def _built(self, request: KernelRequest) -> Kernel:
        ir = self.library[request.blueprint].ir
        if request.reads != "declared":
            ir = ir.reading(request.reads)
        reason = why_not(ir, request.site)
        if reason is not None:
            raise KernelError(f"{request.blueprint} does not fit the site: {reason}")
        dims = dict(request.dims)
        price = cost(ir, request.site, dims)
        kernel = Kernel(
            kernel_id=kernel_id(ir, request.site, dims),
            ir=ir,
            params=price.params,
            macs=price.macs,
            nbytes=4 * price.params,
            make=lambda seed, device: build(ir, request.site, dims, seed=seed, device=device),
        )
        _warm_up(kernel, request.site)
        return kernel


def kernel_id(ir: BlueprintIR, site: SiteShape, dims: dict[str, int]) -> str:
    """Return `<ir hash>-<target>-<pipeline>-<toolchain hash>` of an eager kernel."""
    sizes = "x".join(f"{name}{size}" for name, size in sorted(dims.items())) or "fixed"
    target = f"{site.layout}.{site.d_in}.{site.d_out}.{sizes}"
    return f"{ir.id[:16]}-{target}-eager-{_TOOLCHAIN}"


def _warm_up(kernel: Kernel, site: SiteShape) -> None:
    # The default precision is the whole process's: a trainer in bfloat16 sets and resets it while this thread works.
    child = kernel.make(0, torch.device("cpu")).float()
    width = site.d_out if kernel.ir.reads == "output" else site.d_in
    with torch.no_grad():
        result = child(torch.zeros(_example_shape(site, width), dtype=torch.float32))
    if not torch.isfinite(result).all():
        raise KernelError(f"{kernel.kernel_id} returned a non-finite value in its warm-up.")


def _example_shape(site: SiteShape, width: int) -> tuple[int, ...]:
    if site.layout == "bchw":
        side = max(1, round(site.tokens**0.5))
        return (_WARM_UP_SAMPLES, width, side, max(1, site.tokens // side))
    return (_WARM_UP_SAMPLES, site.tokens, width) if site.layout == "btd" else (_WARM_UP_SAMPLES, width)
