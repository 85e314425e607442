import os
import threading
import time

import pytest
import torch

from esper.blueprints import STANDARD, SiteShape, load_library
from esper.kasmina import library_store
from esper.kasmina.cache import KernelCache
from esper.kasmina.kernels import KernelRequest
from esper.kasmina.library_store import LibraryKernelStore, kernel_id
from esper.leyline.errors import KernelError

SITES = {"btd": SiteShape("btd", 8, 8, 4), "bd": SiteShape("bd", 8, 8), "bchw": SiteShape("bchw", 8, 8, 12)}
LIBRARY = load_library()


@pytest.fixture
def store():
    made = LibraryKernelStore()
    yield made
    made.close()


def wait(store, request):
    deadline = time.monotonic() + 30
    while (kernel := store.poll(request)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return kernel


@pytest.mark.parametrize("name", STANDARD)
def test_every_blueprint_is_served_for_its_layouts(store, name):
    ir = LIBRARY[name].ir
    for layout in ir.layouts:
        site = SITES[layout]._replace(kind="linear" if layout != "bchw" else "conv2d")
        for reads in ("declared", ir.reads, *ir.also_reads):
            kernel = wait(store, KernelRequest(name, site, reads))
            assert kernel.ir.reads == (ir.reads if reads == "declared" else reads)
            assert sum(p.numel() for p in kernel.make(0, torch.device("cpu")).parameters()) == kernel.params


def test_nothing_is_built_in_the_callers_thread(store, monkeypatch):
    threads = set()
    real = library_store.build
    monkeypatch.setattr(
        library_store, "build", lambda *a, **k: threads.add(threading.current_thread().name) or real(*a, **k)
    )
    before = torch.get_rng_state()
    wait(store, KernelRequest("BP-MLP-GELU", SITES["bd"]))
    assert torch.equal(before, torch.get_rng_state())
    assert all(name.startswith("esper-kernels") for name in threads)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_child_that_lay_ready_is_like_any_other(store, precision):
    request, device = KernelRequest("BP-CONV-CAUSAL", SITES["btd"]), torch.device("cpu")
    make = wait(store, request).make
    torch.set_default_dtype(precision)
    try:
        assert not make.empty
        children = [make(7, device)]
        assert make.empty
        children.append(make(7, device))
    finally:
        torch.set_default_dtype(torch.float32)
    store.prefetch(request)
    deadline = time.monotonic() + 30
    while make.empty:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    children.append(make(7, device))
    first, *others = [dict(child.named_parameters()) for child in children]
    assert all(weight.dtype is torch.float32 and weight.requires_grad for weight in first.values())
    for other in others:
        assert all(torch.equal(other[name], weight) for name, weight in first.items())
        assert all(other[name] is not weight for name, weight in first.items())


def test_a_build_is_waited_for_with_patience_only(store, monkeypatch):
    gate, real = threading.Event(), library_store.build
    monkeypatch.setattr(library_store, "build", lambda *a, **k: gate.wait(30) and real(*a, **k))
    request = KernelRequest("BP-MLP-GELU", SITES["bd"])
    store.patience_s = 0.05
    start = time.perf_counter()
    store.prefetch(request)
    assert store.poll(request) is None
    assert time.perf_counter() - start < 5.0
    store.patience_s = 30.0
    threading.Timer(0.05, gate.set).start()
    assert store.poll(request).params > 0


def test_a_crash_while_building_is_an_error_that_stays(store, monkeypatch):
    calls = []
    monkeypatch.setattr(library_store, "build", lambda *a, **k: calls.append(1) or 1 / 0)
    request = KernelRequest("BP-MLP-GELU", SITES["bd"])
    for _ in range(3):
        with pytest.raises(KernelError, match="division by zero"):
            wait(store, request)
    assert len(calls) == 1


def test_a_kernel_that_warms_up_to_nan_is_refused(store, monkeypatch):
    class Nan(torch.nn.Module):
        def forward(self, x):
            return x / 0 * 0

    monkeypatch.setattr(library_store, "build", lambda *a, **k: Nan())
    with pytest.raises(KernelError, match="non-finite"):
        wait(store, KernelRequest("BP-MLP-GELU", SITES["bd"]))


def test_the_warm_up_does_not_train(store, monkeypatch):
    """In training a child may count what it sees, or wait for the other ranks."""
    seen, real = [], library_store.build
    monkeypatch.setattr(library_store, "build", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    for name in ("BP-LOAD-BAL-EMA", "BP-MON-ACT-STATS"):
        wait(store, KernelRequest(name, SITES["btd"]))
        warm, fresh = seen[-1], store.poll(KernelRequest(name, SITES["btd"])).make(0, torch.device("cpu"))
        assert fresh.training and not warm.training
        assert all(map(torch.equal, fresh.buffers(), warm.buffers()))


def test_a_kernel_evicted_while_it_is_built_is_not_offered(store, monkeypatch):
    gate, real = threading.Event(), library_store.build
    monkeypatch.setattr(library_store, "build", lambda *a, **k: gate.wait(30) and real(*a, **k))
    request = KernelRequest("BP-MLP-GELU", SITES["bd"])
    store.prefetch(request)
    store.evict(kernel_id(LIBRARY["BP-MLP-GELU"].ir, request.site, {}))
    gate.set()
    with pytest.raises(KernelError, match="failed in this run"):
        wait(store, request)


def test_what_the_cache_drops_is_built_again():
    store = LibraryKernelStore(cache=KernelCache(max_bytes=1))
    one, two = (KernelRequest("BP-NORM-RMS", SITES[layout]) for layout in ("bd", "btd"))
    first = wait(store, one)
    wait(store, two)
    assert one not in store.cache
    assert wait(store, one).kernel_id == first.kernel_id
    store.close()


def test_a_closed_store_can_be_used_again(store):
    request = KernelRequest("BP-NORM-RMS", SITES["bd"])
    store.close()
    store.close()
    assert wait(store, request) is store.poll(request)


def test_ids_name_what_differs():
    ir = LIBRARY["BP-MLP-GELU"].ir
    site = SITES["bd"]
    ids = {
        kernel_id(ir, site, {}),
        kernel_id(ir, site, {"h": 3}),
        kernel_id(ir, site._replace(d_out=9), {}),
        kernel_id(ir, SITES["btd"], {}),
        kernel_id(ir.reading("input"), site, {}),
        kernel_id(LIBRARY["BP-MLP-SWIGLU"].ir, site, {}),
    }
    assert len(ids) == 6
    assert all(len(name.split("-")) == 4 for name in ids)


def test_a_process_is_never_forked_in_the_middle_of_a_build(store, monkeypatch):
    begun, building = threading.Event(), []
    original = LibraryKernelStore._built

    def slow(self, request):
        building.append(request)
        begun.set()
        time.sleep(0.2)
        kernel = original(self, request)
        building.clear()
        return kernel

    monkeypatch.setattr(LibraryKernelStore, "_built", slow)
    store.prefetch(KernelRequest("BP-MLP-GELU", SITES["btd"]))
    assert begun.wait(30)
    child = os.fork()
    if child == 0:
        os._exit(len(building))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("before", [True, False])
def test_a_trainer_that_changes_the_default_precision_meanwhile_spoils_no_build(store, monkeypatch, before):
    original = library_store.build

    def interrupted(*args, **given):
        torch.set_default_dtype(torch.bfloat16 if before else torch.float32)
        child = original(*args, **given)
        torch.set_default_dtype(torch.float32 if before else torch.bfloat16)
        return child

    monkeypatch.setattr(library_store, "build", interrupted)
    try:
        assert wait(store, KernelRequest("BP-MLP-GELU", SITES["btd"])) is not None
    finally:
        torch.set_default_dtype(torch.float32)
