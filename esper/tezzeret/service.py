"""Tezzeret at work: requests in, jobs out, artifacts into Urza, and the news of them onto the bus."""

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, final

from esper.blueprints.hashing import canonical_json
from esper.leyline.artifacts import CompilationRequest, CompiledKernel, KernelManifest, KernelSpec, Pipeline
from esper.leyline.codec import decode, encode
from esper.leyline.envelope import COMPILATION, Priority
from esper.leyline.errors import (
    BlueprintError,
    ContractError,
    EsperError,
    IllegalTransition,
    KernelError,
    StoreError,
    TrustError,
)
from esper.leyline.events import KernelReady, KernelRejected, Rejection
from esper.leyline.kernels import ArtifactStatus, CompilationRecord
from esper.oona.contracts import Bus, Delivery
from esper.tezzeret.compile import compile_kernel
from esper.tezzeret.idle import HIGH_INTEREST, Candidate, Tier, choose, next_idle
from esper.tezzeret.job import Order
from esper.tezzeret.specs import blueprint_of
from esper.tezzeret.toolchain import fingerprint, kernel_id, toolchain, toolchain_hash
from esper.tezzeret.validator import Bounds, check_ir
from esper.urza.store import Urza
from esper.workers.contracts import JobResult, JobState, Pool

REQUESTED: Final = f"{COMPILATION}.requested"
"""Topic on which kernels are asked for."""

READY: Final = f"{COMPILATION}.ready"
"""Topic of `KernelReady`."""

FAILED: Final = f"{COMPILATION}.failed"
"""Topic of `KernelRejected`, for blueprints that are invalid and kernels that cannot be compiled."""

_AGAIN: Final = "~"
"""Separates a kernel's id from the number of a later try, in the key of a job."""

_AT_MOST: Final = 100
_IN_USE: Final = frozenset({ArtifactStatus.PENDING_BENCHMARKING, ArtifactStatus.VALIDATED})
_SETTLED: Final = _IN_USE | {ArtifactStatus.REJECTED}
_log = logging.getLogger(__name__)


@final
class Tezzeret:
    """Answers requests for kernels; whoever owns it calls `step` again and again.

    A request is acknowledged when its answer is out, so that after a crash it comes again, meets its job in the pool's
    journal or its kernel in the store, and is answered from there.

    Args:
        bus: brings requests, takes the news.
        urza: takes the artifacts; must hold Tezzeret's key.
        pool: compiles; its module is `esper.tezzeret.job`.
        bounds: what a child may at most be; None for the defaults.
        idle_after_s: quiet time after which it compiles what nobody asked for, in seconds.
    """

    def __init__(
        self, bus: Bus, urza: Urza, pool: Pool, *, bounds: Bounds | None = None, idle_after_s: float = 60.0
    ) -> None:
        """Join the group of those who compile."""
        self.idle_after_s = idle_after_s
        self._bus, self._urza, self._pool, self._bounds = bus, urza, pool, bounds
        self._requests = bus.subscribe(REQUESTED, group="tezzeret")
        self._waiting: dict[str, dict[int, Delivery]] = {}
        self._specs: dict[str, KernelSpec] = {}
        self._candidates: dict[str, Candidate] = {}
        self._busy = time.monotonic()

    def step(self, timeout_s: float) -> bool:
        """Do one round: results first, then requests, then, in idle time, one compilation of its own choice.

        Args:
            timeout_s: longest wait for a request, in seconds.

        Returns:
            Whether there was anything to do.

        Raises:
            BusError: the news cannot be published; what was not acknowledged comes again.
        """
        results = self._pool.poll(0.0)
        for result in results:
            self._finish(result)
        taken = 0
        # One by one: what is more urgent may come while another is dealt with.
        for delivery in self._received(0.0 if results else timeout_s):
            self._take(delivery)
            taken += 1
        if results or taken:
            self._busy = time.monotonic()
        return bool(results or taken) or self._use_idle_time()

    def close(self) -> None:
        """Leave the bus; jobs that run end in the pool, and are taken up by the next Tezzeret."""
        self._requests.close()

    # --- requests -------------------------------------------------------------------------------------------------

    def _received(self, timeout_s: float) -> Iterator[Delivery]:
        for number in range(_AT_MOST):
            try:
                delivery = self._requests.receive(0.0 if number else timeout_s)
            except ContractError as error:
                _log.warning("a request cannot be read and is dropped: %s", error)
                continue
            if delivery is None:
                return
            yield delivery

    def _take(self, delivery: Delivery) -> None:
        request = delivery.message
        if not isinstance(request, CompilationRequest):
            _log.warning("%s on %s is no request and is dropped.", delivery.envelope.kind, REQUESTED)
            self._requests.ack(delivery)
            return
        if any(delivery.offset in asked for asked in self._waiting.values()):
            return  # the bus repeats what is not acknowledged, and its job is under way
        try:
            check_ir(request.spec, self._bounds)
            pipeline = self._chosen(request)
            name = kernel_id(request.spec, pipeline)
            self._give_up_damaged(name)
        except (BlueprintError, KernelError, ContractError, TrustError) as error:
            self._refuse(request, error, delivery)
            return
        if self._urza.has(name) and self._urza.kernel(name).status in _SETTLED:
            self._answer_again(name, delivery)
            return
        self._waiting.setdefault(name, {})[delivery.offset] = delivery
        self._specs[name] = request.spec
        if pipeline == "fast":
            self._make_fast(name, request)
        else:
            request = request.model_copy(update={"pipeline": pipeline})
            self._submit(name, name, request, self._urgency(request))

    def _give_up_damaged(self, name: str) -> None:
        """Make room for a kernel whose records cannot be read: nobody can use it, and it is made anew.

        Raises:
            SchemaMismatch: another release has written them.
            TrustError: somebody else has.
        """
        problem = self._urza.give_up_damaged(name)
        if problem:
            _log.warning("%s is made anew: %s", name, problem)

    def _chosen(self, request: CompilationRequest) -> Pipeline:
        stats = self._pool.stats()
        waiting = stats.jobs.get(JobState.WAITING, 0)
        chosen = choose(request.pipeline, request.interest, waiting, stats.over_budget)
        if chosen == "fast" and request.pipeline is None:
            put_off = Candidate(request.spec, "standard", Tier.HIGH_INTEREST, request.interest, time.time())
            self._candidates.setdefault(kernel_id(request.spec, "standard"), put_off)
        return chosen

    def _urgency(self, request: CompilationRequest) -> Priority:
        """Return how urgent a request is: what is wanted, or did well in earlier runs, goes first."""
        interest = {"request": request.interest}
        with suppress(StoreError, TrustError):
            interest |= self._urza.blueprint(blueprint_of(request.spec).id).interest_scores
        return Priority.HIGH if max(interest.values()) >= HIGH_INTEREST else Priority.NORMAL

    def _submit(self, key: str, name: str, request: CompilationRequest, priority: Priority) -> None:
        self._specs[name] = request.spec
        self._mark(blueprint_of(request.spec).id, ArtifactStatus.COMPILING)
        order = Order(request=request, fingerprint=fingerprint())
        self._pool.submit(key, "compile", encode(order), priority=priority)

    def _make_fast(self, name: str, request: CompilationRequest) -> None:
        """Write the artifact of the fast tier here and now: nothing is compiled for it."""
        with tempfile.TemporaryDirectory(prefix="esper-fast-") as folder:
            made = compile_kernel(request.spec, "fast", Path(folder))
            files = {file: (Path(folder) / file).read_bytes() for file in made.manifest.files}
        manifest, record = (canonical_json(part.model_dump(mode="json")).decode() for part in made)
        self._store(name, CompiledKernel(manifest=manifest, files=files, record=record))

    def _answer_again(self, name: str, delivery: Delivery) -> None:
        """Answer a request for a kernel that is there; a verdict that was given is in the store."""
        kernel = self._urza.kernel(name)
        if kernel.status is ArtifactStatus.PENDING_BENCHMARKING:
            record = kernel.compilation_record
            self._announce(self._urza.manifest(name), record, delivery.envelope.trace_id, delivery.envelope.priority)
        self._requests.ack(delivery)

    def _refuse(self, request: CompilationRequest, error: EsperError, delivery: Delivery) -> None:
        """Answer a request for what cannot be compiled at all; no job is made of it."""
        blueprint_id = ""
        with suppress(BlueprintError):
            blueprint_id = blueprint_of(request.spec).id
        invalid = isinstance(error, BlueprintError)
        reason = Rejection.INVALID_BLUEPRINT if invalid else Rejection.COMPILATION_FAILED
        # What is wrong with the store is not the blueprint's fault.
        if isinstance(error, BlueprintError | KernelError):
            self._mark(blueprint_id, ArtifactStatus.INVALID, str(error))
        self._reject("", blueprint_id, reason, str(error), delivery.envelope.trace_id)
        self._requests.ack(delivery)

    # --- results --------------------------------------------------------------------------------------------------

    def _finish(self, result: JobResult) -> None:
        name = result.key.partition(_AGAIN)[0]
        if not result.ok:
            self._fail(name, result.reasons[-1] if result.reasons else f"the job is {result.state}")
            return
        try:
            self._store(name, decode(CompiledKernel, result.result))
        except ContractError as error:
            self._fail(name, f"the worker's answer cannot be read: {error}")

    def _store(self, name: str, kernel: CompiledKernel) -> None:
        """Put an artifact into the store and tell everyone who asked for it."""
        try:
            manifest = KernelManifest.model_validate_json(kernel.manifest)
            record = CompilationRecord.model_validate_json(kernel.record)
            if manifest.kernel_id != name:
                raise KernelError(f"the worker made {manifest.kernel_id}: it has another toolchain than this machine.")
            self._urza.put(kernel)
        except (EsperError, ValueError) as error:
            self._fail(name, f"{type(error).__name__}: {error}")
            return
        self._candidates.pop(name, None)
        self._specs.pop(name, None)
        asked = self._waiting.pop(name, {})
        urgency = min((delivery.envelope.priority for delivery in asked.values()), default=Priority.LOW)
        for trace in {delivery.envelope.trace_id for delivery in asked.values()} or {""}:
            self._announce(manifest, record, trace, urgency)
        self._acknowledge(asked)

    def _fail(self, name: str, detail: str) -> None:
        """Tell everyone who asked; after a restart nobody is known until the request comes again."""
        asked, spec = self._waiting.pop(name, {}), self._specs.pop(name, None)
        _log.warning("%s is not compiled: %s", name, detail)
        if spec is None:
            return
        blueprint_id = blueprint_of(spec).id
        self._mark(blueprint_id, ArtifactStatus.INVALID, detail)
        for trace in {delivery.envelope.trace_id for delivery in asked.values()} or {""}:
            self._reject(name, blueprint_id, Rejection.COMPILATION_FAILED, detail, trace)
        self._remember_failure(name, spec)
        self._acknowledge(asked)

    def _remember_failure(self, name: str, spec: KernelSpec) -> None:
        now, before = time.time(), self._candidates.get(name)
        pipeline: Pipeline = "aggressive" if "-aggressive-" in name else "standard"
        fresh = Candidate(spec, pipeline, Tier.RECENT_FAILURE, since=now)
        failed = before._replace(tier=Tier.RECENT_FAILURE) if before else fresh
        self._candidates[name] = failed._replace(tried=now, tries=failed.tries + 1)

    # --- idle time ------------------------------------------------------------------------------------------------

    def _use_idle_time(self) -> bool:
        now = time.monotonic()
        if now - self._busy < self.idle_after_s or not self._is_idle():
            return False
        self._busy = now
        candidate = next_idle([*self._candidates.values(), *self._outdated()], time.time())
        if candidate is None:
            return False
        name = kernel_id(candidate.spec, candidate.pipeline)
        again = f"{name}{_AGAIN}{candidate.tries}" if candidate.tries else name
        request = CompilationRequest(
            spec=candidate.spec, pipeline=candidate.pipeline, interest=candidate.interest, requester="tezzeret"
        )
        self._submit(again, name, request, Priority.LOW)
        return True

    def _is_idle(self) -> bool:
        stats = self._pool.stats()
        return not (stats.over_budget or stats.jobs.get(JobState.WAITING) or stats.jobs.get(JobState.LEASED))

    def _outdated(self) -> Iterator[Candidate]:
        """Yield the kernels in use that were made elsewhere, unless they were made or tried here too."""
        for kernel in self._urza.kernels():
            if kernel.status not in _IN_USE or kernel.compilation_pipeline == "fast":
                continue
            if kernel.id.endswith(toolchain_hash()):
                continue
            # One whose records are damaged is made anew when somebody asks for it.
            with suppress(BlueprintError, KernelError, StoreError, TrustError):
                old = self._urza.manifest(kernel.id)
                # Ids of earlier releases do not name the binary interface.
                if (old.toolchain, old.fingerprint) == (toolchain(), fingerprint()):
                    continue
                name = kernel_id(old.spec, old.pipeline)
                if name not in self._candidates and not self._urza.has(name):
                    interest = max(kernel.interest_scores.values(), default=0.5)
                    yield Candidate(old.spec, old.pipeline, Tier.OUTDATED_TOOLCHAIN, interest, old.created)

    # --- news -----------------------------------------------------------------------------------------------------

    def _announce(
        self, manifest: KernelManifest, record: CompilationRecord | None, trace: str, urgency: Priority
    ) -> None:
        ready = KernelReady(
            kernel_artifact_id=manifest.kernel_id,
            blueprint_id=manifest.blueprint_id,
            pipeline=manifest.pipeline,
            target=manifest.spec.target,
            compilation_seconds=record.compilation_seconds if record else 0.0,
        )
        self._bus.publish(ready, READY, priority=urgency, trace_id=trace)

    def _reject(self, name: str, blueprint_id: str, reason: Rejection, detail: str, trace: str) -> None:
        rejected = KernelRejected(kernel_artifact_id=name, blueprint_id=blueprint_id, reason=reason, detail=detail)
        self._bus.publish(rejected, FAILED, trace_id=trace)

    def _acknowledge(self, asked: dict[int, Delivery]) -> None:
        for delivery in asked.values():
            self._requests.ack(delivery)

    def _mark(self, blueprint_id: str, status: ArtifactStatus, detail: str = "") -> None:
        """Tell the store how far a blueprint is, if it knows it and it is not further already."""
        with suppress(StoreError, IllegalTransition):
            self._urza.set_blueprint(blueprint_id, status, detail=detail)
