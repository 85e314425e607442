"""The fast tier: kernels built from the blueprint library on a background thread."""

import hashlib
import logging
import math
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from typing import final

import torch
from torch import Tensor, nn

from esper.blueprints import BlueprintIR, Library, SiteShape, build, load_library, why_not
from esper.blueprints.build import Unborn
from esper.blueprints.plan import make_plan
from esper.kasmina.cache import KernelCache
from esper.kasmina.kernels import Kernel, KernelRequest, KernelStore
from esper.leyline.errors import KernelError

_TOOLCHAIN = hashlib.sha256(f"torch-{torch.__version__}".encode()).hexdigest()[:12]
_WARM_UP_SAMPLES = 2
_log = logging.getLogger(__name__)

_BUILDING = threading.RLock()


def building() -> AbstractContextManager[object]:
    """Return the lock to hold during a build: a process forked meanwhile would inherit torch's locks as they were."""
    return _BUILDING


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
        self._nurseries: dict[KernelRequest, _Nursery] = {}

    def prefetch(self, request: KernelRequest) -> None:
        """Queue the build unless it is under way or has failed; of a kernel that is ready, queue another child."""
        if request in self._under_way or request in self._failed:
            return
        if request not in self.cache:
            self._under_way[request] = self._background().submit(self._ingest, request)
        elif (nursery := self._nurseries.get(request)) is not None and nursery.empty:
            self._background().submit(nursery.prepare)

    def _background(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="esper-kernels")
        return self._pool

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

    def wait(self, request: KernelRequest) -> Kernel:
        """Return the kernel without keeping it; for threads that may take their time.

        Raises:
            KernelError: it cannot be had.
        """
        return self._ingest(request)

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
        blueprint = self.library[request.blueprint]
        ir = blueprint.ir
        if request.reads != "declared":
            ir = ir.reading(request.reads)
        reason = why_not(ir, request.site)
        if reason is not None:
            raise KernelError(f"{request.blueprint} does not fit the site: {reason}")
        dims = dict(request.dims)
        price = blueprint.estimate(request.site, dims, reads=ir.reads)
        kernel = Kernel(
            kernel_id=kernel_id(ir, request.site, dims),
            ir=ir,
            params=price.params,
            macs=price.macs,
            nbytes=4 * price.params,
            make=(nursery := _Nursery(ir, request.site, dims)),
            latency_ms=price.latency_ms,
            memory_mb=price.memory_mb,
        )
        _warm_up(kernel, request.site)
        nursery.prepare()
        self._nurseries[request] = nursery
        return kernel


class _Nursery:
    """Makes the children of one kernel; one is prepared, so that the training thread need only fill in its weights.

    Args:
        ir: the blueprint.
        site: the place.
        dims: chosen sizes.
    """

    def __init__(self, ir: BlueprintIR, site: SiteShape, dims: dict[str, int]) -> None:
        """Prepare nothing yet."""
        self.ir, self.site, self.dims = ir, site, dims
        self._prepared: list[Unborn] = []

    @property
    def empty(self) -> bool:
        """Whether no child is prepared."""
        return not self._prepared

    def prepare(self) -> None:
        """Prepare a child if there is none."""
        with _BUILDING:
            if self.empty:
                self._prepared.append(Unborn(self.ir, self.site, make_plan(self.ir, self.site, self.dims)))

    def __call__(self, seed: int, device: torch.device) -> nn.Module:
        """Return a child with the initial weights of a seed."""
        with suppress(IndexError):
            return self._prepared.pop().born(seed, device)
        return build(self.ir, self.site, self.dims, seed=seed, device=device)


def kernel_id(ir: BlueprintIR, site: SiteShape, dims: dict[str, int]) -> str:
    """Return `<ir hash>-<target>-<pipeline>-<toolchain hash>` of an eager kernel."""
    sizes = "x".join(f"{name}{size}" for name, size in sorted(dims.items())) or "fixed"
    target = f"{site.layout}.{site.d_in}.{site.d_out}.{sizes}"
    return f"{ir.id[:16]}-{target}-eager-{_TOOLCHAIN}"


def _warm_up(kernel: Kernel, site: SiteShape) -> None:
    # The default precision is the whole process's: a trainer in bfloat16 sets and resets it while this thread works.
    # In evaluation: in training a child may count what it sees, or speak to the other ranks.
    child = kernel.make(0, torch.device("cpu")).float().eval()
    # Backwards too: what torch prepares once for each kind of operation would otherwise be paid by the first step.
    with torch.enable_grad():
        result = child(example(site, kernel.ir).requires_grad_())
        if result.requires_grad:
            result.sum().backward()
    if not torch.isfinite(result).all():
        raise KernelError(f"{kernel.kernel_id} returned a non-finite value in its warm-up.")


def example(site: SiteShape, ir: BlueprintIR) -> Tensor:
    """Return two samples of what a child reads at a site, the same each time."""
    width = site.d_out if ir.reads == "output" else site.d_in
    shape = {"bd": (width,), "btd": (site.tokens, width), "bchw": (width, *image_sides(site.tokens))}[site.layout]
    count = _WARM_UP_SAMPLES * math.prod(shape)
    return torch.linspace(-1.0, 1.0, count, dtype=torch.float32).view(_WARM_UP_SAMPLES, *shape)


def image_sides(tokens: int) -> tuple[int, int]:
    """Return height and width of the image of `tokens` pixels that kernels are tried with.

    Example:
        >>> image_sides(64), image_sides(32)
        ((8, 8), (4, 8))
    """
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return height, tokens // height
