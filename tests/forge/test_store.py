"""A run's kernel store over a real bus and a real Urza: asks, adopts what is validated, refuses what is doctored."""

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from esper.blueprints import load_library
from esper.forge.client import Forge
from esper.forge.link import FAULTED, REQUESTED, ForgeLink
from esper.karn.service import stated
from esper.kasmina.cache import KernelCache
from esper.kasmina.compiled import CompiledChild
from esper.kasmina.fingerprint import fingerprint
from esper.kasmina.forge_store import ForgeStore
from esper.kasmina.kernels import Kernel, KernelRequest
from esper.leyline.artifacts import CompilationRequest, KernelFaulted
from esper.leyline.errors import BusError
from esper.leyline.events import Fault, KernelCharacterized
from esper.leyline.ids import SeedId
from esper.leyline.kernels import BenchmarkResults, UrabraskValidationReport
from esper.leyline.reports import HardwareContext
from esper.leyline.states import Reason
from esper.oona.contracts import Bus
from esper.oona.memory import MemoryBus
from esper.testing import check_store
from esper.urza.signing import KeyRing
from esper.urza.store import Urza
from tests.kasmina.conftest import Rig
from tests.kernels import SITE, compiled, parcel, spec

REQUEST = KernelRequest("BP-MLP-GELU", SITE, dims=tuple(spec().dims.items()))
CPU = torch.device("cpu")


class Shared(Bus):
    """A bus that outlives who uses it."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.publish, self.subscribe, self.forget = bus.publish, bus.subscribe, bus.forget  # type: ignore[method-assign]

    def publish(self, *args: Any, **kwargs: Any) -> Any: ...
    def subscribe(self, *args: Any, **kwargs: Any) -> Any: ...
    def forget(self, group: str) -> None: ...
    def close(self) -> None: ...


class World:
    """A bus and a store of their own, and a judge."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bus = folder, MemoryBus()
        self.urza = Urza(folder / "store", KeyRing(folder / "keys"))
        self.stores: list[ForgeStore] = []

    def shelf(self) -> Urza:
        return Urza(self.folder / "store", KeyRing.public_only(self.folder / "keys"))

    def open(self, **given: Any) -> ForgeStore:
        self.stores.append(ForgeStore(ForgeLink(lambda: Shared(self.bus), self.shelf, fingerprint), **given))
        return self.stores[-1]

    def promote(self, folder: Path, another: str = "", latency_ms: float = 1.0) -> str:
        """Validate a compiled kernel; `another` makes it a second one of its spec, as a second toolchain would."""
        self.urza.submit(stated(load_library()["BP-MLP-GELU"].ir))
        sent = parcel(folder)
        manifest = json.loads(sent.manifest)
        manifest["kernel_id"] += another
        kernel = self.urza.put(sent.model_copy(update={"manifest": json.dumps(manifest)}))
        measured = BenchmarkResults(
            latency_ms_mean=latency_ms,
            latency_ms_p99=latency_ms,
            throughput_ops_per_sec=1e3 / latency_ms,
            memory_mb_peak=1.0,
            precision_drift=0.0,
        )
        verdict = UrabraskValidationReport(
            kernel_artifact_id=kernel.id,
            benchmark_results=measured,
            passed_validation=True,
            risk_score=0.1,
            conf_level=0.9,
            hardware_context=HardwareContext(device_type="cpu"),
            report_timestamp=time.time(),
        )
        self.urza.judge(verdict)
        told = KernelCharacterized(
            kernel_artifact_id=kernel.id, blueprint_id=kernel.blueprint_id, risk_score=0.1, conf_level=0.9
        )
        self.bus.publish(told, "validation.characterized")
        return kernel.id

    def close(self) -> None:
        for store in self.stores:
            store.close()
        self.urza.close()
        self.bus.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def until(ready: Callable[[], Any], limit_s: float = 20.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := ready()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)
    return found


def is_compiled(kernel: Kernel | None) -> bool:
    return kernel is not None and isinstance(kernel.make(0, CPU), CompiledChild)


def test_without_anything_compiled_it_is_a_store_like_any_other(world: World) -> None:
    check_store(lambda: world.open())


def test_what_is_not_there_is_asked_for_once(world: World) -> None:
    with world.bus.subscribe(REQUESTED) as requests:
        store = world.open()
        for _ in range(3):
            store.prefetch(REQUEST)
        assert until(lambda: store.poll(REQUEST)).kernel_id.count("-eager-") == 1
        delivery = requests.receive(5.0)
        assert delivery is not None and isinstance(delivery.message, CompilationRequest)
        assert delivery.message.spec == spec() and delivery.envelope.trace_id
        assert requests.receive(0.3) is None


def test_a_forge_that_cannot_be_reached_is_done_without(world: World) -> None:
    def connect() -> Bus:
        raise BusError("nobody there")

    store = ForgeStore(ForgeLink(connect, lambda: None, fingerprint))
    world.stores.append(store)
    began = time.monotonic()
    assert until(lambda: store.poll(REQUEST)).kernel_id.count("-eager-") == 1
    assert time.monotonic() - began < 5.0, "a run must not wait for a forge"


@pytest.mark.slow
def test_what_was_validated_before_the_run_is_adopted(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    kernel_id = world.promote(compiled(tmp_path_factory)[0])
    store = world.open(adopt="known")
    kernel = store.poll(REQUEST)
    assert kernel is not None and kernel.kernel_id == kernel_id and is_compiled(kernel)
    eager = store.portable().poll(REQUEST)
    assert eager is not None and not is_compiled(eager)
    one, two = kernel.make(5, CPU), eager.make(5, CPU)
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


@pytest.mark.slow
@pytest.mark.parametrize("adopt", ["known", "any"])
def test_what_is_validated_during_the_run_is_adopted_only_if_asked_for(
    world: World, adopt: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = world.open(adopt=adopt)
    until(lambda: store.poll(REQUEST))
    world.promote(compiled(tmp_path_factory)[0])
    if adopt == "any":
        assert until(lambda: is_compiled(store.poll(REQUEST)))
    else:
        time.sleep(1.0)
        assert not is_compiled(store.poll(REQUEST))


@pytest.mark.slow
def test_a_run_says_how_many_kernels_it_missed(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    forge = Forge(enabled=True, root=str(world.folder))
    assert forge.unfinished() == 0
    store = forge._store = world.open(adopt="known")
    until(lambda: store.poll(REQUEST))
    assert forge.unfinished() == 1
    world.promote(compiled(tmp_path_factory)[0])
    assert forge.unfinished() == 0, "it has its verdict, though this run may not use it any more"
    assert store.missed() == [spec()]


@pytest.mark.slow
def test_what_was_validated_while_nobody_listened_is_adopted_too(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    there = False

    def connect() -> Bus:
        if not there:
            raise BusError("nobody there")
        return Shared(world.bus)

    store = ForgeStore(ForgeLink(connect, world.shelf, fingerprint), adopt="any")
    world.stores.append(store)
    until(lambda: store.poll(REQUEST))
    until(lambda: store._looked[REQUEST].is_set())
    world.promote(compiled(tmp_path_factory)[0])
    there = True
    assert until(lambda: is_compiled(store.poll(REQUEST)))


@pytest.mark.slow
def test_a_kernel_that_fails_is_reported_and_never_offered_again(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kernel_id = world.promote(compiled(tmp_path_factory)[0])
    with world.bus.subscribe(FAULTED) as faults:
        store = world.open(run_id="run-1")
        assert is_compiled(store.poll(REQUEST))
        store.evict(kernel_id)
        next_best = store.poll(REQUEST)
        assert next_best is not None and not is_compiled(next_best)
        delivery = faults.receive(5.0)
        assert delivery is not None and isinstance(delivery.message, KernelFaulted)
        assert delivery.message.kernel_artifact_id == kernel_id and delivery.message.run_id == "run-1"


def doctor(world: World, kernel_id: str, name: str = "fw.so") -> None:
    """Flip a bit in a file of a kernel."""
    file = world.urza.folder(kernel_id) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.chmod(0o600)
    file.write_bytes(bytes(data))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fw.so", "bw.so", "manifest.json", "ir.json"])
def test_a_doctored_file_is_refused_and_the_eager_kernel_offered(
    world: World, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kernel_id = world.promote(compiled(tmp_path_factory)[0])
    doctor(world, kernel_id, name)
    store = world.open()
    assert not is_compiled(store.poll(REQUEST))
    assert kernel_id in store.refused
    assert world.urza.alerts()


@pytest.mark.slow
@pytest.mark.parametrize("doctored", [1, 2])
def test_the_best_kernel_that_can_be_loaded_is_offered(
    world: World, doctored: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = compiled(tmp_path_factory)[0]
    names = [world.promote(folder, "b", latency_ms=0.5), world.promote(folder, "a", latency_ms=1.0)]
    for name in names[:doctored]:
        doctor(world, name)
    store = world.open()
    offered = store.poll(REQUEST)
    assert offered is not None and is_compiled(offered) is (doctored == 1)
    assert doctored == 2 or offered.kernel_id == names[1]
    assert set(store.refused) == set(names[:doctored])


@pytest.mark.slow
def test_a_seed_whose_kernel_fails_is_culled_and_the_next_seed_gets_the_next_best(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = compiled(tmp_path_factory)[0]
    names = [world.promote(folder, "b", latency_ms=0.5), world.promote(folder, "a", latency_ms=1.0)]
    host, x = nn.Sequential(nn.Linear(SITE.d_in, SITE.d_out)), torch.randn(2, SITE.tokens, SITE.d_in)
    rig, grown = Rig(host, x, store=world.open(run_id="run-1")), []
    with world.bus.subscribe(FAULTED) as faults:
        for slot in range(3):
            graft = rig.grow(f"0#0.{slot}", dims=dict(spec().dims))
            grown.append(rig.bank.records[SeedId("0", 0, slot)].kernel_id)
            graft.fail(Fault.RAISED, "it went wrong")
            rig.cull(f"0#0.{slot}", Reason.RUNTIME_ERROR)
        told = [faults.receive(5.0), faults.receive(5.0)]
    assert grown[:2] == names and "-eager-" in grown[2]
    assert [letter.message.kernel_artifact_id for letter in told if letter is not None] == names  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_kernel_that_had_to_leave_the_cache_is_loaded_again(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kernel_id = world.promote(compiled(tmp_path_factory)[0])
    free = 2**40
    store = world.open(cache=KernelCache(free=lambda: free))
    # A kernel serves places of every kind, under a request for each.
    other = dataclasses.replace(REQUEST, site=SITE._replace(kind="mlp"))
    for request in (REQUEST, other):
        found = store.poll(request)
        assert found is not None and found.kernel_id == kernel_id
    assert store.cache.counts().evictions == 0
    free = 0
    until(lambda: store.cache.counts().evictions == 1)
    assert REQUEST not in store.cache
    for request in (REQUEST, other, REQUEST):
        found = store.poll(request)
        assert found is not None and found.kernel_id == kernel_id and is_compiled(found)
    assert store.cache.counts()[:3] == (5, 0, 4)


@pytest.mark.slow
def test_a_rebuilt_child_goes_back_to_its_kernel(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    kernel_id = world.promote(compiled(tmp_path_factory)[0])
    store = world.open()
    kernel = store.poll(REQUEST)
    assert kernel is not None
    plain = copy.deepcopy(kernel.make(3, CPU))
    parameters = [id(parameter) for parameter in plain.parameters()]
    again = store.reclaim(kernel_id, plain)
    assert isinstance(again, CompiledChild) and [id(p) for p in again.parameters()] == parameters
    gone = copy.deepcopy(again)
    assert store.reclaim(kernel_id.replace("standard", "another"), gone) is gone


@pytest.mark.slow
def test_a_resumed_run_is_offered_the_kernels_of_its_beginning(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = world.open()
    until(lambda: first.poll(REQUEST))
    world.promote(compiled(tmp_path_factory)[0])
    resumed = world.open()
    resumed.restore(first.state())
    assert not is_compiled(resumed.poll(REQUEST))
    assert not is_compiled(world.open(before=first.began).poll(REQUEST))
    assert is_compiled(world.open().poll(REQUEST))
