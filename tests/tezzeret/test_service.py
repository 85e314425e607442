"""Tezzeret between a real bus, a real store and a pool whose answers a test writes."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from esper.blueprints.hashing import canonical_json
from esper.leyline.artifacts import CompilationRequest, CompiledKernel, KernelManifest, KernelSpec, Pipeline
from esper.leyline.base import Message
from esper.leyline.codec import decode, encode
from esper.leyline.envelope import COMPILATION, Envelope, Priority
from esper.leyline.events import KernelReady, KernelRejected, Rejection
from esper.leyline.kernels import ArtifactStatus, Blueprint, CompilationRecord, CompiledKernelArtifact
from esper.oona.contracts import BusLimits, Subscription
from esper.oona.memory import MemoryBus
from esper.tezzeret import service, toolchain
from esper.tezzeret.job import Order
from esper.tezzeret.service import REQUESTED, Tezzeret
from esper.tezzeret.specs import blueprint_of
from esper.tezzeret.toolchain import fingerprint, kernel_id
from esper.urza import KeyRing, Urza
from esper.urza.records import _summed
from esper.workers.contracts import JobResult, JobState, Pool, PoolStats
from tests.tezzeret.samples import STUCK, spec
from tests.urza.samples import verdict
from tests.urza.test_disk import PICKLE, execute


class Answers(Pool):
    """Ends a job when the test says how; gives a known key the same answer again, as every pool does."""

    def __init__(self) -> None:
        self.jobs: dict[str, CompilationRequest] = {}
        self.fingerprints: dict[str, str] = {}
        self.order: list[str] = []
        self.priorities: dict[str, int] = {}
        self.results: dict[str, JobResult] = {}
        self.ended: list[JobResult] = []
        self.over_budget, self.waiting = False, 0

    def submit(self, key: str, kind: str, payload: bytes, *, priority: int = 2) -> str:
        if key in self.results:
            self.ended.append(self.results[key])
        elif key not in self.jobs:
            order = decode(Order, payload)
            self.jobs[key], self.fingerprints[key] = order.request, order.fingerprint
            self.order.append(key)
            self.priorities[key] = priority
        return key

    def end(self, key: str, result: bytes = b"", reason: str = "") -> None:
        state = JobState.FAILED if reason else JobState.DONE
        del self.jobs[key]
        self.results[key] = JobResult(
            job_id=key, key=key, kind="compile", state=state, result=result, reasons=(reason,) if reason else ()
        )
        self.ended.append(self.results[key])

    def poll(self, timeout_s: float) -> list[JobResult]:
        ended, self.ended = self.ended, []
        return ended

    def stats(self) -> PoolStats:
        waiting = self.waiting + len(self.jobs)
        return PoolStats(name="t", jobs={JobState.WAITING: waiting}, cpu_budget_s=0.0 if self.over_budget else None)

    def close(self) -> None:
        self.jobs.clear()


@pytest.fixture
def urza(tmp_path: Path) -> Iterator[Urza]:
    with Urza(tmp_path / "store", KeyRing(tmp_path / "keys")) as store:
        yield store


@pytest.fixture
def bus() -> Iterator[MemoryBus]:
    with MemoryBus() as made:
        yield made


@pytest.fixture
def pool() -> Answers:
    return Answers()


@pytest.fixture
def news(bus: MemoryBus) -> Iterator[Subscription]:
    with bus.subscribe(f"{COMPILATION}.ready", f"{COMPILATION}.failed") as heard:
        yield heard


@pytest.fixture
def tezzeret(bus: MemoryBus, urza: Urza, pool: Answers) -> Iterator[Tezzeret]:
    made = Tezzeret(bus, urza, pool, idle_after_s=1e9)
    yield made
    made.close()


def ask(bus: MemoryBus, one: KernelSpec, trace: str = "", **fields: object) -> Envelope:
    request = CompilationRequest.model_validate({"spec": one, **fields})
    return bus.publish(request, REQUESTED, trace_id=trace)


def heard(news: Subscription) -> list[tuple[str, Message]]:
    found = []
    while (delivery := news.receive(0.0)) is not None:
        news.ack(delivery)
        found.append((delivery.envelope.trace_id, delivery.message))
    return found


def artifact(one: KernelSpec, pipeline: Pipeline = "standard", name: str = "", **fields: Any) -> bytes:
    """What a worker sends back, but for the machine code."""
    ir = blueprint_of(one)
    files = {"ir.json": one.ir.encode(), "fw.so": b"forward", "bw.so": b"backward"}
    manifest = KernelManifest(
        kernel_id=name or kernel_id(one, pipeline),
        name=ir.name,
        blueprint_id=ir.id,
        spec=one,
        pipeline=pipeline,
        files={file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
        **fields,
    )
    record = CompilationRecord(pipeline=pipeline, compilation_seconds=2.5)
    texts = (canonical_json(part.model_dump(mode="json")).decode() for part in (manifest, record))
    return encode(CompiledKernel(manifest=next(texts), files=files, record=next(texts)))


def known(urza: Urza, one: KernelSpec) -> str:
    ir = blueprint_of(one)
    return urza.submit(Blueprint(id=ir.id, name=ir.name, ir=one.ir)).id


def test_a_request_becomes_a_job_an_artifact_and_news_of_one_trace(
    tezzeret: Tezzeret, bus: MemoryBus, urza: Urza, pool: Answers, news: Subscription
) -> None:
    one, name = spec(), kernel_id(spec(), "standard")
    blueprint = known(urza, one)
    ask(bus, one, "trace-1")
    assert tezzeret.step(1.0)
    assert pool.jobs[name].pipeline == "standard"
    assert urza.blueprint(blueprint).status is ArtifactStatus.COMPILING
    pool.end(name, artifact(one))
    assert tezzeret.step(0.0)
    ready = KernelReady(
        kernel_artifact_id=name, blueprint_id=blueprint, pipeline="standard", target="cpu", compilation_seconds=2.5
    )
    assert heard(news) == [("trace-1", ready)]
    assert urza.kernel(name).status is ArtifactStatus.PENDING_BENCHMARKING
    assert urza.blueprint(blueprint).status is ArtifactStatus.PENDING_BENCHMARKING
    assert not tezzeret.step(0.0)


def test_many_requests_for_one_kernel_are_one_job_and_each_hears_of_it(
    tezzeret: Tezzeret, bus: MemoryBus, pool: Answers, news: Subscription
) -> None:
    for trace in ("a", "b", "b"):
        ask(bus, spec(), trace)
    ask(bus, spec(dims={"h": 32}), "c")
    tezzeret.step(1.0)
    assert pool.order == [kernel_id(spec(), "standard")]
    pool.end(pool.order[0], artifact(spec()))
    tezzeret.step(0.0)
    assert sorted(trace for trace, _ in heard(news)) == ["a", "b", "c"]
    ask(bus, spec(), "later")
    tezzeret.step(1.0)
    assert [trace for trace, _ in heard(news)] == ["later"]
    assert len(pool.order) == 1


def test_an_invalid_blueprint_is_refused_with_the_reason_and_costs_no_job(
    tezzeret: Tezzeret, bus: MemoryBus, urza: Urza, pool: Answers, news: Subscription
) -> None:
    blueprint = known(urza, STUCK["dead-relu"])
    ask(bus, STUCK["dead-relu"], "t")
    ask(bus, spec(ir="not json"), "u")
    ask(bus, spec(target="abacus"), "v")
    tezzeret.step(1.0)
    reasons = {trace: message.reason for trace, message in heard(news) if isinstance(message, KernelRejected)}
    assert reasons["t"] is reasons["u"] is Rejection.INVALID_BLUEPRINT
    assert reasons["v"] is Rejection.COMPILATION_FAILED
    assert urza.blueprint(blueprint).status is ArtifactStatus.INVALID
    assert "dead-relu" in urza.reason(blueprint)
    assert not pool.order


@pytest.mark.parametrize("kind", ["reason", "garbage", "other toolchain", "other files"])
def test_a_job_without_a_good_artifact_is_told_as_a_failure(
    tezzeret: Tezzeret, bus: MemoryBus, urza: Urza, pool: Answers, news: Subscription, kind: str
) -> None:
    ask(bus, spec(), "t")
    tezzeret.step(1.0)
    name = pool.order[0]
    spoiled = decode(CompiledKernel, artifact(spec())).model_copy(update={"files": {"fw.so": b"else"}})
    result = {"garbage": b"?", "other toolchain": artifact(spec(), name="k-else"), "other files": encode(spoiled)}
    pool.end(name, result.get(kind, b""), "g++ is out of memory" if kind == "reason" else "")
    tezzeret.step(0.0)
    ((trace, message),) = heard(news)
    assert isinstance(message, KernelRejected)
    assert (trace, message.reason, message.kernel_artifact_id) == ("t", Rejection.COMPILATION_FAILED, name)
    assert {"reason": "out of memory", "other toolchain": "toolchain", "other files": "fw.so"}.get(
        kind, ""
    ) in message.detail
    assert not urza.has(name)


def test_a_request_that_was_not_answered_comes_again_after_a_crash(
    bus: MemoryBus, urza: Urza, pool: Answers, news: Subscription
) -> None:
    first = Tezzeret(bus, urza, pool)
    ask(bus, spec(), "t")
    first.step(1.0)
    first.close()
    pool.end(pool.order[0], artifact(spec()))
    second = Tezzeret(bus, urza, pool)
    second.step(0.0)
    second.step(0.0)
    assert ("t" in [trace for trace, _ in heard(news)]) and len(pool.order) == 1
    second.close()


def test_load_sends_what_few_want_to_the_fast_tier_and_idle_time_makes_up_for_it(
    bus: MemoryBus, urza: Urza, pool: Answers, news: Subscription
) -> None:
    tezzeret = Tezzeret(bus, urza, pool, idle_after_s=0.0)
    pool.waiting = 100
    ask(bus, spec(), "t")
    tezzeret.step(1.0)
    ((_, message),) = heard(news)
    assert isinstance(message, KernelReady) and message.pipeline == "fast"
    assert set(urza.manifest(message.kernel_artifact_id).files) >= {"ir.json"} and not pool.order
    assert not tezzeret.step(0.0)
    pool.waiting, pool.over_budget = 0, True
    assert not tezzeret.step(0.0)
    pool.over_budget = False
    assert tezzeret.step(0.0)
    assert pool.order == [kernel_id(spec(), "standard")]
    pool.end(pool.order[0], artifact(spec()))
    assert tezzeret.step(0.0) and not tezzeret.step(0.0)
    tezzeret.close()


def test_a_failure_is_tried_again_in_idle_time(
    bus: MemoryBus, urza: Urza, pool: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    tezzeret = Tezzeret(bus, urza, pool, idle_after_s=0.0)
    ask(bus, spec())
    tezzeret.step(1.0)
    pool.end(pool.order[0], reason="the disk was full")
    tezzeret.step(0.0)
    assert not tezzeret.step(0.0)
    now = time.time()
    monkeypatch.setattr(service.time, "time", lambda: now + 700.0)
    assert tezzeret.step(0.0)
    assert pool.order[1] == f"{pool.order[0]}~1"
    pool.end(pool.order[1], artifact(spec()))
    tezzeret.step(0.0)
    assert urza.has(pool.order[0])
    tezzeret.close()


def test_a_kernel_of_an_older_toolchain_is_made_anew_in_idle_time(bus: MemoryBus, urza: Urza, pool: Answers) -> None:
    old = kernel_id(spec(), "standard").rsplit("-", 1)[0] + "-000000000000"
    urza.put(decode(CompiledKernel, artifact(spec(), name=old)))
    tezzeret = Tezzeret(bus, urza, pool, idle_after_s=0.0)
    assert tezzeret.step(0.0)
    assert pool.order == [kernel_id(spec(), "standard")]
    pool.end(pool.order[0], artifact(spec()))
    assert tezzeret.step(0.0) and not tezzeret.step(0.0)
    assert urza.has(old)
    tezzeret.close()


def test_what_a_run_asks_for_overtakes_the_checks_of_the_library(
    tezzeret: Tezzeret, bus: MemoryBus, urza: Urza, pool: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = [spec(tokens=number) for number in range(1, 5)]
    for one in library:
        bus.publish(CompilationRequest(spec=one, pipeline="fast", requester="karn"), REQUESTED, priority=Priority.LOW)
    put, done = urza.put, []

    def put_and_ask(kernel: CompiledKernel) -> CompiledKernelArtifact:
        done.append(len(pool.order))
        if len(done) == 2:
            ask(bus, spec(), "run")
        return put(kernel)

    monkeypatch.setattr(urza, "put", put_and_ask)
    with bus.subscribe(f"{COMPILATION}.ready") as news:
        assert tezzeret.step(1.0)
        pool.end(pool.order[0], artifact(spec()))
        tezzeret.step(0.0)
        first = news.receive(0.0)
    assert done == [0, 0, 1, 1, 1], "the run's job had to wait for the library"
    # The news bear the urgency of who asked, so that the run's kernel goes first at Urabrask too.
    assert first is not None and (first.envelope.trace_id, first.envelope.priority) == ("run", Priority.NORMAL)


def test_what_did_well_in_earlier_runs_or_is_wanted_goes_first(
    tezzeret: Tezzeret, bus: MemoryBus, urza: Urza, pool: Answers
) -> None:
    plain, wanted, proven = (spec(tokens=number) for number in (3, 4, 5))
    ask(bus, plain)
    ask(bus, wanted, interest=0.9)
    tezzeret.step(1.0)
    ir = blueprint_of(proven)
    urza.submit(Blueprint(id=ir.id, name=ir.name, version=ir.version, ir=proven.ir), "test")
    urza.set_blueprint(ir.id, interest={"field": 0.8})
    ask(bus, proven)
    tezzeret.step(1.0)
    given = [pool.priorities[kernel_id(one, "standard")] for one in (plain, wanted, proven)]
    assert given == [Priority.NORMAL, Priority.HIGH, Priority.HIGH]


def test_a_request_that_the_bus_repeats_meanwhile_is_not_answered_twice(urza: Urza, pool: Answers) -> None:
    with MemoryBus(BusLimits(visibility_s=0.02)) as bus, bus.subscribe(f"{COMPILATION}.ready") as news:
        tezzeret = Tezzeret(bus, urza, pool)
        ask(bus, spec(), "t")
        tezzeret.step(1.0)
        pool.waiting = 100
        time.sleep(0.05)
        assert tezzeret.step(1.0)
        pool.end(pool.order[0], artifact(spec()))
        tezzeret.step(0.0)
        assert [trace for trace, _ in heard(news)] == ["t"]
        time.sleep(0.05)
        assert not tezzeret.step(0.0)


def test_a_letter_that_is_no_request_is_dropped(tezzeret: Tezzeret, bus: MemoryBus, pool: Answers) -> None:
    bus.publish(KernelReady(kernel_artifact_id="k", blueprint_id="b", pipeline="fast"), REQUESTED)
    assert tezzeret.step(1.0) and not tezzeret.step(0.0)
    assert not pool.order


def flip(urza: Urza, key: str) -> None:
    """Flip a bit of a record, so that its checksum does not fit."""
    written = bytearray(urza.core.records._cache.get(key))
    written[-1] ^= 1
    urza.core.records._cache.set(key, bytes(written))


def cut(urza: Urza, key: str) -> None:
    """Leave bytes that no message begins with."""
    execute(urza.root / "records/cache.db", "UPDATE Cache SET value = x'00' WHERE key = ?", key)


def validated(urza: Urza, one: KernelSpec) -> str:
    name = kernel_id(one, "standard")
    urza.put(decode(CompiledKernel, artifact(one)))
    urza.judge(verdict(name))
    return name


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("record", ["kernel/{}", "manifest/{}", "attestation/{}/urabrask"])
def test_a_kernel_whose_record_is_damaged_is_made_anew_and_the_damage_is_told(
    tezzeret: Tezzeret, bus: MemoryBus, urza: Urza, pool: Answers, news: Subscription, damage: Any, record: str
) -> None:
    name = validated(urza, spec())
    damage(urza, record.format(name))
    doctor = [finding.problem for finding in urza.check()]
    ask(bus, spec(), "t")
    assert tezzeret.step(1.0) and pool.order == [name]
    pool.end(name, artifact(spec()))
    tezzeret.step(0.0)
    ((trace, message),) = heard(news)
    assert trace == "t" and isinstance(message, KernelReady) and message.kernel_artifact_id == name
    assert urza.kernel(name).status is ArtifactStatus.PENDING_BENCHMARKING and urza.check() == []
    (told,) = [entry.detail for entry in urza.ledger.entries() if entry.action == "given up"]
    (alert,) = urza.alerts()
    assert told in doctor and alert.subject == name and told in alert.detail
    urza.judge(verdict(name, report_timestamp=2.0))
    assert urza.verified(name).manifest.kernel_id == name
    ask(bus, spec(), "again")
    assert tezzeret.step(1.0) and not tezzeret.step(0.0) and pool.order == [name]


def planted(urza: Urza, key: str) -> str:
    """Make a row one that Urza never writes."""
    execute(urza.root / "records/cache.db", "UPDATE Cache SET mode = ? WHERE key = ?", PICKLE, key)
    return "reads no pickle"


def of_a_later_release(urza: Urza, key: str) -> str:
    fields = urza.kernel(key.partition("/")[2]).model_dump() | {"schema_version": "2.0"}
    urza.core.records._cache.set(key, _summed(msgpack.packb(("CompiledKernelArtifact", fields))))
    return "another release"


@pytest.mark.parametrize("write", [planted, of_a_later_release])
def test_a_record_that_others_wrote_stays_and_the_request_is_refused_with_the_reason(
    tezzeret: Tezzeret, bus: MemoryBus, urza: Urza, pool: Answers, news: Subscription, write: Any
) -> None:
    name, blueprint = validated(urza, spec()), known(urza, spec())
    reason, before = write(urza, f"kernel/{name}"), [str(finding) for finding in urza.check()]
    ask(bus, spec(), "t")
    assert tezzeret.step(1.0) and not pool.order
    ((trace, message),) = heard(news)
    assert isinstance(message, KernelRejected) and trace == "t"
    assert message.reason is Rejection.COMPILATION_FAILED and reason in message.detail
    assert before and [str(finding) for finding in urza.check()] == before
    assert [alert.subject for alert in urza.alerts()] == ([name] if write is planted else [])
    assert urza.blueprint(blueprint).status is ArtifactStatus.UNVALIDATED, "the blueprint is as good as before"
    assert not tezzeret.step(0.0), "an answered request does not come again"


def test_a_damaged_record_does_not_hold_up_what_is_done_in_idle_time(bus: MemoryBus, urza: Urza, pool: Answers) -> None:
    damaged, sound = (
        kernel_id(one, "standard").rsplit("-", 1)[0] + "-000000000000" for one in (spec(), spec(tokens=7))
    )
    urza.put(decode(CompiledKernel, artifact(spec(), name=damaged)))
    urza.put(decode(CompiledKernel, artifact(spec(tokens=7), name=sound)))
    cut(urza, f"manifest/{damaged}")
    tezzeret = Tezzeret(bus, urza, pool, idle_after_s=0.0)
    assert tezzeret.step(0.0)
    assert pool.order == [kernel_id(spec(tokens=7), "standard")]
    tezzeret.close()


def test_kernels_of_two_machines_lie_side_by_side_and_each_gets_its_own(
    bus: MemoryBus, urza: Urza, pool: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = ["a" * 64, "b" * 64]
    for machine in machines:
        for module in (service, toolchain):
            monkeypatch.setattr(module, "fingerprint", lambda machine=machine: machine)
        tezzeret = Tezzeret(bus, urza, pool)
        ask(bus, spec())
        assert tezzeret.step(1.0), "the other machine's kernel stood in its place"
        name = pool.order[-1]
        assert pool.fingerprints[name] == machine
        pool.end(name, artifact(spec(), fingerprint=machine))
        tezzeret.step(0.0)
        urza.judge(verdict(name))
        tezzeret.close()
    assert len(pool.order) == 2 and sorted(urza.of_spec(spec())) == sorted(pool.order)
    for name, machine in zip(pool.order, machines, strict=True):
        assert urza.of_spec(spec(), machine) == [name]
        assert urza.verified(name, machine).manifest.fingerprint == machine


def test_a_kernel_of_an_earlier_release_is_offered_and_not_made_anew(bus: MemoryBus, urza: Urza, pool: Answers) -> None:
    made_by: dict[str, Any] = {"toolchain": toolchain.toolchain(), "fingerprint": fingerprint()}
    digits = hashlib.sha256(made_by["toolchain"].encode()).hexdigest()[:12]
    older = f"{kernel_id(spec(), 'standard').rsplit('-', 1)[0]}-{digits}"
    urza.put(decode(CompiledKernel, artifact(spec(), name=older, **made_by)))
    urza.judge(verdict(older))
    tezzeret = Tezzeret(bus, urza, pool, idle_after_s=0.0)
    assert not tezzeret.step(0.0) and not pool.order
    assert urza.of_spec(spec(), fingerprint()) == [older]
    assert urza.verified(older, fingerprint()).manifest.kernel_id == older
    tezzeret.close()
