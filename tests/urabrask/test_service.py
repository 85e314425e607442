"""Letters in, verdicts out, whatever happens in between."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esper.leyline.artifacts import CompiledKernel, KernelFaulted, KernelManifest
from esper.leyline.codec import decode
from esper.leyline.envelope import Priority
from esper.leyline.errors import KernelError
from esper.leyline.events import KernelCharacterized, KernelReady, KernelRejected, Rejection, SecurityAlert
from esper.leyline.kernels import ArtifactStatus
from esper.oona import Bus, BusLimits, MemoryBus, Subscription
from esper.urabrask import job
from esper.urabrask.findings import Failure, Findings, Recipe
from esper.urabrask.service import FAULTED, READY, Urabrask
from esper.urza import KeyRing, Urza
from esper.urza.canonical import parse
from esper.workers.contracts import Pool
from esper.workers.in_process import InProcessPool
from esper.workers.pool import ProcessPool
from tests.kernels import built
from tests.urabrask.findings import findings
from tests.urabrask.kernels import blueprint, doctored, eager_kernel, packed, spec

PATIENCE_S = 240.0
SPEC = spec("BP-PROJ-LORA", d=8, tokens=4)
Found = Callable[[str], Findings]


class Rig:
    """A bus, a store, a pool and the Urabrask between them."""

    def __init__(self, folder: Path, module: Any = job, bus: Bus | None = None, pool: Pool | None = None) -> None:
        self.bus = bus or MemoryBus(BusLimits(visibility_s=0.5))
        self.heard: Subscription = self.bus.subscribe("validation", "system.events")
        self.urza = Urza(folder / "store", KeyRing(folder / "keys"))
        self.pool = pool or InProcessPool("urabrask", module, folder=folder / "pool")
        self.urabrask = Urabrask(self.bus, self.urza, self.pool)

    def put(self, kernel: CompiledKernel) -> str:
        manifest = parse(KernelManifest, kernel.manifest)
        self.urza.submit(blueprint(manifest.spec))
        return self.urza.put(kernel).id

    def ready(self, name: str, trace: str = "t1", priority: Priority = Priority.NORMAL) -> None:
        message = KernelReady(kernel_artifact_id=name, blueprint_id=blueprint(SPEC).id, pipeline="fast")
        self.bus.publish(message, READY, trace_id=trace, priority=priority)

    def until(self, kind: type, trace: str | None = None) -> Any:
        """Step until a message of a kind is heard."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            self.urabrask.step(0.02)
            while (delivery := self.heard.receive(0.0)) is not None:
                self.heard.ack(delivery)
                if isinstance(delivery.message, kind) and trace in (None, delivery.envelope.trace_id):
                    return delivery.message
        raise AssertionError(f"no {kind.__name__} in {PATIENCE_S} s")

    def quiet(self, rounds: int = 10) -> bool:
        return not any(self.urabrask.step(0.02) for _ in range(rounds))

    def close(self) -> None:
        self.urabrask.close()
        self.pool.close()
        self.urza.close()


@contextmanager
def rig(folder: Path, module: Any = job, bus: Bus | None = None, pool: Pool | None = None) -> Iterator[Rig]:
    made = Rig(folder, module, bus, pool)
    try:
        yield made
    finally:
        made.close()


def finding(found: Found, tries: list[str] | None = None) -> Any:
    """A module of jobs that finds what it is told to, for tests of what comes after a gauntlet."""

    def collect(folder: Path, _outcome: object) -> bytes:
        name = parse(KernelManifest, (folder / job.ARTIFACT / "manifest.json").read_bytes()).kernel_id
        if tries is not None:
            tries.append(name)
        return found(name).model_dump_json().encode()

    return SimpleNamespace(prepare=job.prepare, work=lambda folder: None, collect=collect)


def waiting(folder: Path, module: Any) -> InProcessPool:
    """A pool that takes jobs and does none before it is told to."""
    return InProcessPool("urabrask", module, folder=folder / "pool", cpu_budget_s=0.0)


def begin(pool: Pool) -> None:
    assert isinstance(pool, InProcessPool)
    pool._budget = math.inf


def good(name: str) -> Findings:
    return findings(0.7, kernel_id=name)


def native() -> CompiledKernel:
    return eager_kernel(SPEC, pipeline="standard", fw=b"forward", bw=b"backward")


@pytest.mark.slow
def test_an_eager_kernel_is_tried_and_validated(tmp_path: Path, short: None) -> None:
    with rig(tmp_path) as given:
        name = given.put(eager_kernel(SPEC))
        given.ready(name, "trace-7")
        heard = given.until(KernelCharacterized, "trace-7")
        kernel = given.urza.kernel(name)
        assert heard.kernel_artifact_id == name and "eager" in heard.tags
        assert kernel.status is ArtifactStatus.VALIDATED
        assert given.urza.verified(name).manifest.kernel_id == name
        report = kernel.validation_report
        assert report is not None and report.passed_validation and 0.0 < report.conf_level < 1.0
        assert {"step", "wep", "risk.margin"} <= report.baseline_comparison.keys()
        assert given.quiet()


def test_a_fast_kernel_is_validated_and_its_interest_known(tmp_path: Path) -> None:
    with rig(tmp_path, finding(good)) as given:
        name = given.put(native())
        given.ready(name)
        assert "fast-p75" in given.until(KernelCharacterized, "t1").tags
        assert given.urza.kernel(name).interest_scores["urabrask"] > 0.3


def test_a_slow_kernel_is_rejected_with_the_numbers(tmp_path: Path) -> None:
    with rig(tmp_path, finding(lambda name: findings(0.97, kernel_id=name))) as given:
        name = given.put(native())
        given.ready(name)
        heard = given.until(KernelRejected, "t1")
        assert heard.reason is Rejection.TOO_SLOW and "0.970" in heard.detail
        assert given.urza.kernel(name).status is ArtifactStatus.REJECTED
        assert given.urza.reason(name).startswith("TOO_SLOW")


def test_a_wrong_kernel_is_rejected_with_its_input(tmp_path: Path) -> None:
    recipe = Recipe(shape=(5, 4, 8), seed=5)
    failure = Failure(check="batches", detail="off", recipe=recipe, rejection=Rejection.GRADIENT_MISMATCH)

    def wrong(name: str) -> Findings:
        return findings(kernel_id=name, failures=(failure,), measured=None)

    with rig(tmp_path, finding(wrong)) as given:
        given.ready(given.put(native()))
        heard = given.until(KernelRejected)
        assert heard.reason is Rejection.GRADIENT_MISMATCH
        assert recipe.model_dump_json() in heard.detail


def test_a_job_that_never_ends_well_is_a_rejection(tmp_path: Path) -> None:
    def fails(name: str) -> Findings:
        raise KernelError("the worker has no memory")

    with rig(tmp_path, finding(fails)) as given:
        name = given.put(native())
        given.ready(name)
        heard = given.until(KernelRejected, "t1")
        assert heard.reason is Rejection.SANITY_FAILED and "no memory" in heard.detail
        assert given.urza.kernel(name).status is ArtifactStatus.REJECTED


def test_findings_about_another_kernel_count_for_nothing(tmp_path: Path) -> None:
    with rig(tmp_path, finding(lambda name: good("somebody else"))) as given:
        name = given.put(native())
        given.ready(name)
        assert "somebody else" in given.until(KernelRejected).detail
        assert given.urza.kernel(name).status is ArtifactStatus.REJECTED


def test_a_flipped_byte_is_rejected_without_being_run(tmp_path: Path) -> None:
    tries: list[str] = []
    with rig(tmp_path, finding(good, tries)) as given:
        name = given.put(native())
        file = given.urza.folder(name) / "fw.so"
        file.chmod(0o600)
        file.write_bytes(b"Forward")
        given.ready(name)
        alert = given.until(SecurityAlert)
        assert alert.subject == name
        assert given.urza.kernel(name).status is ArtifactStatus.REJECTED
        assert not tries


def test_a_byte_flipped_during_the_gauntlet_is_found(tmp_path: Path) -> None:
    with rig(tmp_path) as given:
        name = given.put(native())
        file = given.urza.folder(name) / "fw.so"

        def meanwhile(name: str) -> Findings:
            file.chmod(0o600)
            file.write_bytes(b"Forward")
            return good(name)

        given.pool.close()
        given.pool = InProcessPool("late", finding(meanwhile), folder=tmp_path / "late")
        given.urabrask.close()
        given.urabrask = Urabrask(given.bus, given.urza, given.pool)
        given.ready(name)
        assert "BadHash" in given.until(KernelRejected).detail
        assert given.urza.alerts()


def test_a_verdict_survives_a_restart_in_the_middle(tmp_path: Path) -> None:
    bus = MemoryBus(BusLimits(visibility_s=0.5))
    slow = finding(lambda name: (time.sleep(0.5), good(name))[1])
    with rig(tmp_path, slow, bus) as first:
        name = first.put(native())
        first.ready(name, "t9")
        first.urabrask.step(0.5)
    tries: list[str] = []
    with rig(tmp_path, finding(good, tries), bus) as second:
        second.until(KernelCharacterized, "t9")
        assert second.urza.kernel(name).status is ArtifactStatus.VALIDATED
        assert tries == [name]


def test_a_letter_about_a_judged_kernel_is_answered_from_the_store(tmp_path: Path) -> None:
    tries: list[str] = []
    with rig(tmp_path, finding(good, tries)) as given:
        name = given.put(native())
        given.ready(name, "a")
        given.until(KernelCharacterized, "a")
        given.ready(name, "b")
        given.until(KernelCharacterized, "b")
        assert tries == [name]


def test_a_kernel_without_a_letter_is_judged_after_the_start(tmp_path: Path) -> None:
    with rig(tmp_path, finding(good)) as given:
        name = given.put(native())
        assert given.until(KernelCharacterized).kernel_artifact_id == name


def test_a_kernel_for_a_run_overtakes_the_checks_of_the_library(tmp_path: Path) -> None:
    tries: list[str] = []
    with rig(tmp_path, pool=waiting(tmp_path, finding(good, tries))) as given:
        given.urabrask.step(0.0)
        library = [given.put(eager_kernel(spec("BP-PROJ-LORA", d=8, tokens=4 + n), f"check-{n}")) for n in range(3)]
        asked, wanted = given.put(eager_kernel(SPEC, "handed-in")), given.put(native())
        for name in library:
            given.ready(name, priority=Priority.LOW)
        given.urabrask.step(0.1)
        for name in (asked, wanted):
            given.ready(name)
        given.urabrask.step(0.1)
        begin(given.pool)
        for _ in (*library, asked, wanted):
            given.until(KernelCharacterized)
        assert tries[:2] == [asked, wanted]


def test_after_a_start_kernels_that_a_run_can_use_go_first(tmp_path: Path) -> None:
    tries: list[str] = []
    with rig(tmp_path, pool=waiting(tmp_path, finding(good, tries))) as given:
        checked, wanted = given.put(eager_kernel(SPEC)), given.put(native())
        given.urabrask.step(0.0)
        begin(given.pool)
        for _ in range(2):
            given.until(KernelCharacterized)
        assert tries == [wanted, checked]


def test_letters_about_nothing_are_dropped(tmp_path: Path) -> None:
    with rig(tmp_path) as given:
        given.ready("no such kernel")
        given.bus.publish(KernelFaulted(kernel_artifact_id="no such kernel"), FAULTED)
        given.bus.publish(KernelRejected(kernel_artifact_id="k", blueprint_id="b", reason="TOO_SLOW"), READY)
        assert given.urabrask.step(0.2)
        time.sleep(0.6)
        assert given.quiet()


@pytest.mark.parametrize("before", [ArtifactStatus.VALIDATED, ArtifactStatus.PENDING_BENCHMARKING])
def test_a_kernel_that_faults_is_evicted_for_good(before: ArtifactStatus, tmp_path: Path) -> None:
    tries: list[str] = []
    with rig(tmp_path, finding(good, tries)) as given:
        given.urabrask.step(0.0)
        name = given.put(native())
        if before is ArtifactStatus.VALIDATED:
            given.ready(name)
            given.until(KernelCharacterized)
        fault = KernelFaulted(kernel_artifact_id=name, run_id="run 5", detail="NOT_FINITE")
        given.bus.publish(fault, FAULTED, trace_id="t5")
        heard = given.until(KernelRejected, "t5")
        assert "run 5" in heard.detail and "NOT_FINITE" in heard.detail
        assert given.urza.kernel(name).status is ArtifactStatus.REJECTED
        # The same kernel, compiled once more, is the same kernel.
        seen = len(tries)
        given.urza.set_kernel(name, ArtifactStatus.COMPILING)
        given.put(eager_kernel(SPEC, pipeline="standard", fw=b"forward again", bw=b"backward"))
        assert given.urza.kernel(name).status is ArtifactStatus.PENDING_BENCHMARKING
        given.ready(name, "t6")
        given.until(KernelRejected, "t6")
        assert given.urza.kernel(name).status is ArtifactStatus.REJECTED
        assert len(tries) == seen


def test_an_archived_kernel_that_faults_stays_out(tmp_path: Path) -> None:
    with rig(tmp_path, finding(good)) as given:
        name = given.put(native())
        given.ready(name)
        given.until(KernelCharacterized)
        given.urza.curate(budget=0)
        assert given.urza.kernel(name).status is ArtifactStatus.ARCHIVED
        given.bus.publish(KernelFaulted(kernel_artifact_id=name, detail="RAISED"), FAULTED)
        given.until(KernelRejected)
        assert given.urza.kernel(name).status is ArtifactStatus.REJECTED


def test_the_payload_is_the_artifact(tmp_path: Path) -> None:
    seen: list[CompiledKernel] = []

    def prepare(payload: bytes, folder: Path) -> list[str]:
        seen.append(decode(CompiledKernel, payload))
        return job.prepare(payload, folder)

    module = finding(good)
    module.prepare = prepare
    with rig(tmp_path, module) as given:
        given.ready(given.put(native()))
        given.until(KernelCharacterized)
    assert seen[0].files["fw.so"] == b"forward" and set(seen[0].files) == {"fw.so", "bw.so", "ir.json"}


@pytest.mark.slow
def test_worker_processes_try_kernels(shared: Path, tmp_path: Path) -> None:
    """A real pool: a good kernel is judged by its numbers, one that crashes leaves the worker alive."""
    crashing = doctored(built(shared, spec()), tmp_path / "artifact", "CRASH", "bw", 700)
    pool = ProcessPool("urabrask", "esper.urabrask.job", folder=tmp_path / "pool")
    with rig(tmp_path, pool=pool) as given:
        name = given.put(packed(crashing))
        given.ready(name, "bad")
        heard = given.until(KernelRejected, "bad")
        assert heard.reason is Rejection.SANITY_FAILED
        assert "SIGSEGV" in heard.detail and "determinism" in heard.detail and '"call":' in heard.detail
        eager = given.put(eager_kernel(SPEC))
        given.ready(eager, "good")
        assert given.until(KernelCharacterized, "good").kernel_artifact_id == eager
        assert pool.stats().deaths == 0


def test_a_kernel_whose_record_is_damaged_is_left_alone(tmp_path: Path) -> None:
    with rig(tmp_path, pool=waiting(tmp_path, finding(good))) as given:
        name = given.put(eager_kernel(SPEC))
        given.ready(name)
        given.urabrask.step(0.1)
        given.urza.core.records._cache.set(f"manifest/{name}", b"damaged")
        begin(given.pool)
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            given.urabrask.step(0.02)  # It raises nothing, or one damaged record would hold up all other kernels.
        assert given.quiet()
        assert given.urza.kernel(name).status is ArtifactStatus.PENDING_BENCHMARKING
        assert [finding.subject for finding in given.urza.check()] == [name]
