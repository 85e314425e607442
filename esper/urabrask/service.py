"""Urabrask at work: compiled kernels in, gauntlets out, verdicts into Urza, and the news of them onto the bus."""

import logging
from collections.abc import Iterator
from typing import Final, final

from pydantic import ValidationError

from esper.leyline.artifacts import CompiledKernel, KernelFaulted
from esper.leyline.base import Message
from esper.leyline.codec import encode
from esper.leyline.envelope import COMPILATION, VALIDATION, Priority, event_topic
from esper.leyline.errors import ContractError, EsperError, StoreError, TrustError
from esper.leyline.events import KernelCharacterized, KernelReady, KernelRejected, Rejection
from esper.leyline.kernels import ArtifactStatus, CompiledKernelArtifact, UrabraskValidationReport
from esper.oona.contracts import Bus, Delivery
from esper.urabrask.findings import Failure, Findings
from esper.urabrask.hardware import hardware
from esper.urabrask.report import Verdict, verdict
from esper.urabrask.tags import Standing, peers_of
from esper.urza.artifacts import MANIFEST, MAX_ARTIFACT, read_file
from esper.urza.canonical import sha256
from esper.urza.door import Door, alert_of
from esper.urza.store import Urza
from esper.workers.contracts import JobResult, Pool

READY: Final = f"{COMPILATION}.ready"
"""Topic of `KernelReady`."""

FAULTED: Final = f"{VALIDATION}.faulted"
"""Topic of `KernelFaulted`."""

CHARACTERIZED: Final = f"{VALIDATION}.characterized"
"""Topic of `KernelCharacterized`."""

REJECTED: Final = f"{VALIDATION}.rejected"
"""Topic of `KernelRejected`."""

CONDEMNED: Final = "FAULTED"
"""First word of the reason of a kernel that failed in a run; no artifact of its id passes again."""

_AT_MOST: Final = 100
_S = ArtifactStatus
_log = logging.getLogger(__name__)


@final
class Urabrask:
    """Judges kernels; whoever owns it calls `step` again and again.

    A letter is acknowledged when its answer is out, so that after a crash it comes again, meets its job in the pool's
    journal or the verdict in the store, and is answered from there.

    Args:
        bus: brings kernels and their faults, takes the verdicts.
        urza: holds the artifacts; must hold Urabrask's key.
        pool: runs gauntlets; its module is `esper.urabrask.job`.
    """

    def __init__(self, bus: Bus, urza: Urza, pool: Pool) -> None:
        """Join the group of those who judge."""
        self._bus, self._urza, self._pool = bus, urza, pool
        self._door = Door(urza.core)
        self._letters = bus.subscribe(READY, FAULTED, group="urabrask")
        self._waiting: dict[str, dict[int, Delivery]] = {}
        self._swept = False

    def step(self, timeout_s: float) -> bool:
        """Do one round: verdicts on what was tried, then letters.

        Args:
            timeout_s: longest wait for a letter, in seconds.

        Returns:
            Whether there was anything to do.

        Raises:
            BusError: a verdict cannot be published; what was not acknowledged comes again.
        """
        self._sweep()
        results = self._pool.poll(0.0)
        # Results that were handed out and not dealt with are asked for again.
        self._swept = not results
        for result in results:
            self._finish(result)
        self._swept = True
        taken = 0
        # One by one: what is more urgent may come while another is dealt with.
        for letter in self._received(0.0 if results else timeout_s):
            self._take(letter)
            taken += 1
        return bool(results or taken)

    def close(self) -> None:
        """Leave the bus; gauntlets that run end in the pool, and are taken up by the next Urabrask."""
        self._letters.close()

    # --- letters --------------------------------------------------------------------------------------------------

    def _received(self, timeout_s: float) -> Iterator[Delivery]:
        for number in range(_AT_MOST):
            try:
                delivery = self._letters.receive(0.0 if number else timeout_s)
            except ContractError as error:
                _log.warning("a letter cannot be read and is dropped: %s", error)
                continue
            if delivery is None:
                return
            yield delivery

    def _take(self, delivery: Delivery) -> None:
        message = delivery.message
        if isinstance(message, KernelReady):
            name = message.kernel_artifact_id
            self._waiting.setdefault(name, {})[delivery.offset] = delivery
            self._start(name)
        elif isinstance(message, KernelFaulted):
            self._condemn(message, delivery.envelope.trace_id)
            self._letters.ack(delivery)
        else:
            _log.warning("%s on %s is dropped.", delivery.envelope.kind, delivery.envelope.topic)
            self._letters.ack(delivery)

    def _start(self, name: str) -> None:
        """Have a kernel tried, or answer at once where there is nothing to try."""
        try:
            kernel, _ = self._urza.kernel(name), self._urza.manifest(name)
        except StoreError as error:
            _log.warning("%s is not judged: %s", name, error)
            self._acknowledge(name)
            return
        if kernel.status is not _S.PENDING_BENCHMARKING:
            self._answer(kernel)
            return
        if self._urza.reason(name).startswith(CONDEMNED):
            self._fail(kernel, self._urza.reason(name))
            return
        try:
            payload = encode(self._artifact(kernel))
        except TrustError as error:
            self._bus.publish(alert := alert_of(error, name), event_topic(type(alert).__name__))
            self._fail(kernel, f"{type(error).__name__}: {error}")
        except EsperError as error:
            self._fail(kernel, f"{type(error).__name__}: {error}")
        else:
            self._pool.submit(_key(kernel), "gauntlet", payload, priority=self._urgency(kernel))

    def _urgency(self, kernel: CompiledKernelArtifact) -> Priority:
        """Return that of the most urgent letter; without one, the eager tier waits: a run can use none of its kernels.

        The pool raises a job's priority when it is submitted again, as it is with every letter.
        """
        unasked = Priority.LOW if kernel.compilation_pipeline == "fast" else Priority.NORMAL
        asked = self._waiting.get(kernel.id, {}).values()
        return min((delivery.envelope.priority for delivery in asked), default=unasked)

    def _sweep(self) -> None:
        """After the start, and after trouble: have every kernel tried that waits for it, letter or no letter."""
        if not self._swept:
            self._swept = True
            for kernel in self._urza.kernels():
                if kernel.status is _S.PENDING_BENCHMARKING:
                    self._start(kernel.id)

    def _artifact(self, kernel: CompiledKernelArtifact) -> CompiledKernel:
        """Return an artifact's bytes after checking that they are what Tezzeret signed.

        Raises:
            TrustError: they are not.
        """
        manifest = self._door.signed(kernel)
        with self._urza.core.tree.opened(kernel.kernel_ref) as folder:
            text = read_file(folder, MANIFEST)
            files = {name: read_file(folder, name, MAX_ARTIFACT) for name in manifest.files}
        # Once more, on the very bytes that will be tried: somebody may have written since they were checked.
        found = {name: sha256(data) for name, data in files.items()}
        if sha256(text) != kernel.kernel_ref or found != manifest.files:
            self._door.signed(kernel)
            raise StoreError(f"the files of {kernel.id} change while they are read")
        return CompiledKernel(manifest=text.decode(), files=files)

    # --- verdicts -------------------------------------------------------------------------------------------------

    def _finish(self, result: JobResult) -> None:
        name, _, ref = result.key.rpartition("@")
        try:
            kernel, _ = self._urza.kernel(name), self._urza.manifest(name)
        except StoreError as error:
            _log.warning("a gauntlet of %s is dropped: %s", name, error)
            return
        if kernel.status is not _S.PENDING_BENCHMARKING or not kernel.kernel_ref.startswith(ref):
            self._answer(kernel)
            return
        self._judge(kernel, self._found(kernel, result))

    def _found(self, kernel: CompiledKernelArtifact, result: JobResult) -> Findings:
        """Return what the gauntlet found; one that could not be run to its end has found a kernel unfit."""
        detail = result.reasons[-1] if result.reasons else f"the job is {result.state}"
        if result.ok:
            try:
                found = Findings.model_validate_json(result.result)
            except ValidationError as error:
                detail = f"the worker's answer cannot be read: {error}"
            else:
                if found.kernel_id == kernel.id:
                    return found
                detail = f"the worker tried {found.kernel_id}"
        return self._unfit(kernel, f"the gauntlet could not be run to its end: {detail}")

    def _unfit(self, kernel: CompiledKernelArtifact, detail: str) -> Findings:
        manifest = self._urza.manifest(kernel.id)
        failure = Failure(check="gauntlet", detail=detail)
        return Findings(kernel_id=kernel.id, pipeline=manifest.pipeline, failures=(failure,), hardware=hardware())

    def _judge(self, kernel: CompiledKernelArtifact, found: Findings) -> None:
        """Write the verdict, and tell everyone who waits for it."""
        spec = self._urza.manifest(kernel.id).spec
        judged = verdict(found, spec, self._peers(found, kernel.id))
        try:
            self._write(kernel, judged)
        except TrustError as error:  # The files have changed since they were tried; Urza has kept the alert.
            self._fail(kernel, f"{type(error).__name__}: {error}")
            return
        self._answer(self._urza.kernel(kernel.id))

    def _write(self, kernel: CompiledKernelArtifact, judged: Verdict) -> None:
        reason = None if judged.rejection is None else f"{judged.rejection}: {judged.detail}"
        self._urza.judge(judged.report, reason)
        self._urza.interest(kernel.id, "urabrask", judged.interest)
        if reason is not None:
            _log.info("%s is rejected: %s", kernel.id, reason)

    def _fail(self, kernel: CompiledKernelArtifact, detail: str) -> None:
        """Reject a kernel without having tried it."""
        found = self._unfit(kernel, detail)
        report = verdict(found, self._urza.manifest(kernel.id).spec).report
        self._urza.judge(report, detail if detail.startswith(CONDEMNED) else f"{Rejection.SANITY_FAILED}: {detail}")
        self._answer(self._urza.kernel(kernel.id))

    def _peers(self, found: Findings, name: str) -> list[Standing]:
        reports: list[UrabraskValidationReport] = [
            kernel.validation_report
            for kernel in self._urza.kernels()
            if kernel.id != name and kernel.status is _S.VALIDATED and kernel.validation_report is not None
        ]
        return peers_of(reports, found.hardware)

    # --- faults ---------------------------------------------------------------------------------------------------

    def _condemn(self, fault: KernelFaulted, trace: str) -> None:
        """Reject a kernel that failed in a run, for good."""
        name = fault.kernel_artifact_id
        reason = f"{CONDEMNED} in run {fault.run_id or 'unknown'}: {fault.detail}"
        try:
            kernel = self._urza.kernel(name)
            if kernel.status is _S.ARCHIVED:
                kernel = self._urza.restore(name)
            if kernel.status is _S.PENDING_BENCHMARKING:
                self._fail(kernel, reason)
            elif kernel.status is _S.VALIDATED:
                self._urza.reject(name, reason)
            elif not self._urza.reason(name).startswith(CONDEMNED):
                _log.warning("%s failed in a run and is %s already: %s", name, kernel.status, fault.detail)
            self._publish(self._urza.kernel(name), trace)
        except EsperError as error:
            _log.warning("%s failed in a run and cannot be rejected: %s", name, error)

    # --- news -----------------------------------------------------------------------------------------------------

    def _answer(self, kernel: CompiledKernelArtifact) -> None:
        """Tell everyone who waits for a kernel's verdict what it is; a verdict that nobody waits for is told too."""
        asked = self._waiting.get(kernel.id, {})
        for trace in {delivery.envelope.trace_id for delivery in asked.values()} or {""}:
            self._publish(kernel, trace)
        self._acknowledge(kernel.id)

    def _publish(self, kernel: CompiledKernelArtifact, trace: str) -> None:
        message, topic = _news(kernel, self._urza.reason(kernel.id))
        if message is not None:
            self._bus.publish(message, topic, trace_id=trace)

    def _acknowledge(self, name: str) -> None:
        for delivery in self._waiting.pop(name, {}).values():
            self._letters.ack(delivery)


def _key(kernel: CompiledKernelArtifact) -> str:
    """Return the name of a kernel's job; other bytes under the same id are another job."""
    return f"{kernel.id}@{kernel.kernel_ref[:16]}"


def _news(kernel: CompiledKernelArtifact, reason: str) -> tuple[Message | None, str]:
    """Return what there is to say of a kernel, and on which topic."""
    report = kernel.validation_report
    if kernel.status is _S.VALIDATED and report is not None:
        passed = KernelCharacterized(
            kernel_artifact_id=kernel.id,
            blueprint_id=kernel.blueprint_id,
            tags=report.generated_tags,
            risk_score=report.risk_score,
            conf_level=report.conf_level,
        )
        return passed, CHARACTERIZED
    if kernel.status is _S.REJECTED:
        word, _, detail = reason.partition(": ")
        known = Rejection(word) if word in set(Rejection) else Rejection.SANITY_FAILED
        failed = KernelRejected(
            kernel_artifact_id=kernel.id,
            blueprint_id=kernel.blueprint_id,
            reason=known,
            detail=detail if word in set(Rejection) else reason,
        )
        return failed, REJECTED
    return None, ""
