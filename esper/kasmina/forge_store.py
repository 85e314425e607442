"""Kernels from the forge: the eager one at once, a compiled one as soon as it is validated, and never a wait."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

from esper.blueprints.build import Child
from esper.blueprints.hashing import canonical_json
from esper.kasmina.cache import KernelCache
from esper.kasmina.compiled import CompiledChild, CompiledPair
from esper.kasmina.kernels import Kernel, KernelRequest, KernelStore
from esper.kasmina.library_store import LibraryKernelStore, building, example
from esper.leyline.artifacts import CompilationRequest, KernelFaulted, KernelManifest, KernelSpec
from esper.leyline.base import Message
from esper.leyline.errors import BusError, EsperError, KernelError
from esper.leyline.events import KernelCharacterized
from esper.leyline.reports import FieldReport

_log = logging.getLogger(__name__)

Adopt = Literal["known", "any"]
"""Which compiled kernels a run may use: those that were validated before it began, so that it can be repeated, or any
that is validated when it is asked for."""

_TOLERANCE = 1e-3
"""Largest difference from the eager child in the warm-up, relative; Urabrask has measured far more closely."""

_PAUSE_S = 0.2
"""Time between two attempts to reach the forge, in seconds."""

_LOOK_S = 0.05
_SHRINK_S = 1.0
_MOST_REPORTS = 1000
"""Field reports that wait for a forge; older ones are in the run's own file only."""


class Verified(Protocol):
    """A kernel whose signature, role, serial and hashes have been checked."""

    @property
    def manifest(self) -> KernelManifest:
        """What it says of itself."""

    @property
    def folder(self) -> Path:
        """Where its files are."""


class Forge(Protocol):
    """What is needed of bus and store; every call may take its time, and is made off the training thread."""

    def send(self, message: CompilationRequest | KernelFaulted | FieldReport) -> None:
        """Ask for a kernel, report one that failed, or tell what became of a graft.

        Raises:
            BusError: the bus is not there yet, or lost.
        """

    def works(self) -> bool:
        """Return whether it is there at this moment; none is started for it."""

    def hear(self, timeout_s: float) -> Message | None:
        """Return the next thing said about kernels, or None.

        Raises:
            BusError: the bus is not there yet, or lost.
        """

    def validated(self, spec: KernelSpec, before: float | None) -> list[str]:
        """Return the ids of the kernels of this very spec that were validated before a time, best first.

        Args:
            spec: the kernel.
            before: seconds since the Unix epoch; None for no bound.
        """

    def verified(self, kernel_id: str) -> Verified:
        """Return a kernel after checking everything that can be checked.

        Raises:
            TrustError: it is not what it claims to be, or was compiled for another machine.
        """

    def latency_ms(self, kernel_id: str) -> float | None:
        """Return the forward time of 8 samples that Urabrask measured, in milliseconds; None if it did not."""

    def close(self) -> None:
        """Hang up."""


class _Wanted(NamedTuple):
    request: KernelRequest
    eager: Kernel
    spec: KernelSpec


@final
class ForgeStore(KernelStore):
    """Offers a compiled kernel where one is validated and loaded, else the eager one.

    Everything slow (asking, verifying, loading, warming up) happens on one background thread.

    Args:
        forge: the way to the forge, which need not be there yet.
        adopt: which compiled kernels may be used.
        before: when the run began, in seconds since the Unix epoch; None is now.
        eager: store of the eager kernels.
        cache: loaded kernels; None makes a cache of the default size.
        run_id: who asks.
        patience_s: with `known`, longest wait at a boundary for a kernel that is being loaded, in seconds.
    """

    def __init__(
        self,
        forge: Forge,
        *,
        adopt: Adopt = "known",
        before: float | None = None,
        eager: LibraryKernelStore | None = None,
        cache: KernelCache | None = None,
        run_id: str = "",
        patience_s: float = 10.0,
    ) -> None:
        """Start the background thread."""
        self.adopt, self.run_id, self.patience_s = adopt, run_id, patience_s
        self.eager = eager if eager is not None else LibraryKernelStore()
        self.cache = cache if cache is not None else KernelCache()
        self.began = time.time() if before is None else before
        self.refused: dict[str, str] = {}
        self._forge = forge
        self._outbox: deque[CompilationRequest | KernelFaulted] = deque()
        self._reports: deque[FieldReport] = deque(maxlen=_MOST_REPORTS)
        self._looked: dict[KernelRequest, threading.Event] = {}
        self._loaded: set[KernelRequest] = set()
        self._asked: set[KernelRequest] = set()
        self._wanted: dict[str, _Wanted] = {}
        self._deaf = True
        self._shrunk = time.monotonic()
        self._todo: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="esper-forge", daemon=True)
        self._thread.start()

    # --- on the training thread -----------------------------------------------------------------------------------

    def prefetch(self, request: KernelRequest) -> None:
        """Start the eager kernel, and have a compiled one loaded, or asked for; one that has left the cache comes back.

        A kernel leaves for want of memory, and when it failed; then the next best of its spec is looked for.
        """
        self.eager.prefetch(request)
        has_left = request in self._loaded and request not in self.cache
        if has_left or request not in self._looked:
            self._loaded.discard(request)
            self._looked[request] = threading.Event()
            self._todo.put(lambda: self._look(request))

    def poll(self, request: KernelRequest) -> Kernel | None:
        """Return the compiled kernel if it is loaded, else the eager one."""
        self.prefetch(request)
        if self.adopt == "known" and not self._looked[request].wait(self.patience_s):
            _log.warning("the forge did not say in %s s whether it has %s.", self.patience_s, request.blueprint)
            self._looked[request].set()
        compiled = self.cache.get(request)
        return compiled if compiled is not None else self.eager.poll(request)

    def evict(self, kernel_id: str) -> None:
        """Never offer this kernel again; the forge is told of a compiled one."""
        if _is_eager(kernel_id):
            self.eager.evict(kernel_id)
        elif kernel_id not in self.refused:
            self._refuse(kernel_id, "it failed in this run")
            detail = self.refused[kernel_id]
            self._outbox.append(KernelFaulted(kernel_artifact_id=kernel_id, run_id=self.run_id, detail=detail))

    def report(self, report: FieldReport) -> None:
        """Tell the forge what became of a graft, as soon as it is there; a run without one keeps its own file."""
        self._reports.append(report)

    def portable(self) -> KernelStore:
        """Return the store of the eager kernels: ranks must not differ in theirs."""
        return self.eager

    def reclaim(self, kernel_id: str, child: nn.Module) -> nn.Module:
        """Return a rebuilt child on the compiled kernel that it had, where that can be had again."""
        if not isinstance(child, Child) or isinstance(child, CompiledChild) or _is_eager(kernel_id):
            return child
        answer: SimpleQueue[CompiledPair | str] = SimpleQueue()
        self._todo.put(lambda: answer.put(self._reload(kernel_id)))
        try:
            found = answer.get(timeout=self.patience_s)
        except Empty:
            found = f"the forge did not answer in {self.patience_s} s"
        if isinstance(found, CompiledPair):
            return CompiledChild.around(child, found)
        _log.warning("%s runs eagerly from here on, equal to rounding: %s.", kernel_id, found)
        return child

    def missed(self) -> list[KernelSpec]:
        """Return what was asked for and has not come."""
        wanted = list(self._wanted.values())
        return [one.spec for one in wanted if one.request in self._asked and one.request not in self._loaded]

    def state(self) -> dict[str, Any]:
        """Return when the run began: a resumed run may use the kernels of then, and no newer ones."""
        return {"began": self.began}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self.began = float(state.get("began", self.began))

    def close(self) -> None:
        """Say what is still to be said, if there is a forge, and hang up; what it was asked for it will still make."""
        self._stop.set()
        self._thread.join(self.patience_s)
        self.eager.close()

    # --- on the background thread ---------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                self._round()
            except Exception as error:  # whatever happens to the forge, the run goes on with eager kernels
                level = logging.DEBUG if isinstance(error, EsperError) else logging.WARNING
                _log.log(level, "the forge is not to be had now: %s", error)
                self._deaf = True
                self._stop.wait(_PAUSE_S)
        with suppress(EsperError):
            if self._forge.works():
                self._say()
        self._forge.close()

    def _round(self) -> None:
        """Do what was asked for here, say what is to be said, and hear what is new."""
        with suppress(Empty):
            while True:
                self._todo.get(timeout=_LOOK_S)()
        if time.monotonic() - self._shrunk > _SHRINK_S:
            self._shrunk = time.monotonic()
            self.cache.shrink()
        self._say()
        heard = self._forge.hear(_LOOK_S)
        if self.adopt == "any":
            self._take_up(heard)

    def _take_up(self, heard: Message | None) -> None:
        """Load what a verdict is about; at the first moment of hearing also what was validated when nobody listened."""
        was_deaf, self._deaf = self._deaf, False
        told = heard.blueprint_id if isinstance(heard, KernelCharacterized) else None
        for wanted in list(self._wanted.values()):
            if was_deaf or wanted.eager.ir.id == told:
                self._ingest(wanted)

    def _say(self) -> None:
        """Send what waits to be sent; what a run needs goes before what others may learn from it."""
        boxes: tuple[deque[Any], ...] = (self._outbox, self._reports)
        for box in boxes:
            while box:
                message = box.popleft()
                try:
                    self._forge.send(message)
                except BusError:
                    box.appendleft(message)
                    raise
                except EsperError as error:  # it would be refused again
                    _log.debug("%s is not sent: %s", type(message).__name__, error)

    def _look(self, request: KernelRequest) -> None:
        """Load what is there already, and ask for what is not."""
        try:
            eager = self.eager.wait(request)
            wanted = _Wanted(request, eager, spec_of(request, eager))
            self._wanted[_key(wanted.spec)] = wanted
            self._ingest(wanted)
            if request not in self._loaded and request not in self._asked:
                self._asked.add(request)
                self._outbox.append(CompilationRequest(spec=wanted.spec, requester=self.run_id))
        except EsperError as error:
            _log.debug("%s is not compiled: %s", request.blueprint, error)
        finally:
            self._looked[request].set()

    def _ingest(self, wanted: _Wanted) -> None:
        for kernel_id in self._forge.validated(wanted.spec, self.began if self.adopt == "known" else None):
            if kernel_id in self.refused:
                continue
            try:
                pair = self._verify(kernel_id)
                measured = self._forge.latency_ms(kernel_id)
                kernel = _kernel(kernel_id, wanted, pair, measured, self._refuse)
                _warm_up(kernel, wanted)
            except EsperError as error:
                self._refuse(kernel_id, str(error))
                _log.warning("kernel %s is not used: %s", kernel_id, error)
                continue
            self.cache.put(wanted.request, kernel)
            self._loaded.add(wanted.request)
            return

    def _verify(self, kernel_id: str) -> CompiledPair:
        found = self._forge.verified(kernel_id)
        with building():
            return CompiledPair(found.folder, found.manifest)

    def _reload(self, kernel_id: str) -> CompiledPair | str:
        try:
            return self._verify(kernel_id)
        except EsperError as error:
            return str(error)

    def _refuse(self, kernel_id: str, why: str) -> None:
        self.refused[kernel_id] = why
        self.cache.evict(kernel_id)


def _is_eager(kernel_id: str) -> bool:
    return not kernel_id or "-eager-" in kernel_id


def spec_of(request: KernelRequest, eager: Kernel) -> KernelSpec:
    """Return what must be compiled to answer a request."""
    site = request.site
    return KernelSpec(
        ir=canonical_json(eager.ir.model_dump(mode="json")).decode(),
        layout=site.layout,
        d_in=site.d_in,
        d_out=site.d_out,
        tokens=site.tokens,
        # Equal kernels serve several families of sites; one name for all of them has one compiled.
        kind=eager.ir.site_kinds[0] if eager.ir.site_kinds else "block",
        dims=dict(request.dims),
    )


def _key(spec: KernelSpec) -> str:
    return canonical_json(spec.model_dump(mode="json")).decode()


def _kernel(
    kernel_id: str, wanted: _Wanted, pair: CompiledPair, latency_ms: float | None, refuse: Callable[[str, str], None]
) -> Kernel:
    eager = wanted.eager

    def make(seed: int, device: torch.device) -> nn.Module:
        child = eager.make(seed, device)
        try:
            assert isinstance(child, Child)
            return CompiledChild.around(child, pair)
        except KernelError as error:
            refuse(kernel_id, str(error))
            raise

    nbytes, latency_ms = eager.nbytes + pair.nbytes, latency_ms or eager.latency_ms
    return replace(eager, kernel_id=kernel_id, nbytes=nbytes, make=make, latency_ms=latency_ms)


def _warm_up(kernel: Kernel, wanted: _Wanted) -> None:
    """Run forward and backward once, so that the first training step finds them ready, and compare them with eager."""
    with building():
        child = kernel.make(0, torch.device("cpu"))
        assert isinstance(child, CompiledChild)
        x = example(wanted.request.site, kernel.ir).requires_grad_()
        compiled, eager = (_gradients(run(x), [x, *child.parameters()]) for run in (child, child.eager))
        for found, expected in zip(compiled, eager, strict=True):
            apart = (found - expected).norm() / expected.norm().clamp_min(1e-6)
            if not apart <= _TOLERANCE:
                raise KernelError(f"{kernel.kernel_id} differs from its eager child by {float(apart):.1e}, relative.")


def _gradients(result: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(result.shape, generator=generator)
    found = torch.autograd.grad(result, wanted, gradient, allow_unused=True)
    return [result.detach(), *(g if g is not None else torch.zeros_like(t) for g, t in zip(found, wanted, strict=True))]
