from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper.blueprints import SiteShape, load_library
from esper.kasmina.cache import SHARE, KernelCache, free_memory, soft_limit
from esper.kasmina.kernels import Kernel, KernelRequest

IR = load_library()["BP-NORM-RMS"].ir


def request(number):
    return KernelRequest("BP-NORM-RMS", SiteShape("bd", number, number))


def kernel(number, nbytes):
    return Kernel(f"k{number % 4}", IR, 1, 1, nbytes, lambda seed, device: nn.Identity())


@given(
    limit=st.integers(1, 60),
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "get", "evict", "has"]), st.integers(1, 7), st.integers(0, 40)), max_size=40
    ),
)
def test_least_recently_used_leave_first(limit, steps):
    """Against a model: an ordered dict, trimmed from its old end while it is too large."""
    cache, model = KernelCache(limit), OrderedDict()
    hits = misses = 0
    for what, number, nbytes in steps:
        key = request(number)
        if what == "put":
            cache.put(key, kernel(number, nbytes))
            model.pop(number, None)
            model[number] = nbytes
            while sum(model.values()) > limit and len(model) > 1:
                model.popitem(last=False)
        elif what == "get":
            found = cache.get(key)
            assert (found.nbytes if found else None) == model.get(number)
            if number in model:
                model.move_to_end(number)
            hits, misses = hits + (number in model), misses + (number not in model)
        elif what == "evict":
            cache.evict(f"k{number % 4}")
            model = OrderedDict((n, b) for n, b in model.items() if n % 4 != number % 4)
        else:
            assert (key in cache) == (number in model)
        assert cache.nbytes == sum(model.values())
        assert len(cache) == len(model)
        assert cache.nbytes <= limit or len(cache) == 1
    counts = cache.counts()
    assert (counts.hits, counts.misses, counts.kernels, counts.nbytes) == (hits, misses, len(cache), cache.nbytes)
    assert counts.hit_rate == (hits / (hits + misses) if hits + misses else 1.0)


def test_a_hit_makes_a_kernel_young_again():
    cache = KernelCache(20)
    for number in (1, 2):
        cache.put(request(number), kernel(number, 10))
    cache.get(request(1))
    cache.put(request(3), kernel(3, 10))
    assert [request(number) in cache for number in (1, 2, 3)] == [True, False, True]


def test_the_bound_is_on_bytes_not_on_the_count():
    cache = KernelCache(1000)
    for number in range(1, 500):
        cache.put(request(number), kernel(number, 2))
    assert len(cache) == 499
    cache.put(request(500), kernel(500, 900))
    assert len(cache) == 51
    cache.put(request(501), kernel(501, 5000))
    assert (len(cache), cache.nbytes) == (1, 5000)


@given(most=st.integers(0, 10**12), held=st.integers(0, 10**12), free=st.integers(0, 10**12))
def test_the_limit_follows_the_free_memory_and_not_the_cache(most, held, free):
    limit = soft_limit(most, held, free)
    assert 0 <= limit <= most
    assert limit <= SHARE * (held + free)
    given_up = held // 2
    assert soft_limit(most, held - given_up, free + given_up) == limit
    assert soft_limit(most, held, free + 1) >= limit


def test_it_shrinks_while_memory_is_scarce_and_grows_again():
    """What the cache holds is not free; what it gives up is."""
    without_cache = 10_000
    cache = KernelCache(100, free=lambda: without_cache - cache.nbytes)
    for number in range(1, 11):
        cache.put(request(number), kernel(number, 10))
    assert (len(cache), cache.counts().limit) == (10, 100)
    without_cache = 400
    assert cache.shrink() == 6
    assert [number for number in range(1, 11) if request(number) in cache] == [7, 8, 9, 10]
    assert cache.counts()[2:] == (6, 4, 40, 40)
    assert cache.shrink() == 0
    cache.put(request(1), kernel(1, 10))
    assert (len(cache), request(7) in cache) == (4, False)
    without_cache = 10_000
    for number in range(11, 21):
        cache.put(request(number), kernel(number, 10))
    assert len(cache) == 10


def test_without_any_memory_the_last_kernel_is_still_held():
    cache = KernelCache(100, free=lambda: 0)
    for number in (1, 2):
        cache.put(request(number), kernel(number, 10))
    cache.shrink()
    assert (len(cache), request(2) in cache) == (1, True)


def test_a_kernel_that_failed_is_no_eviction_for_want_of_room():
    cache = KernelCache(100)
    cache.put(request(1), kernel(1, 10))
    cache.evict("k1")
    assert cache.counts() == (0, 0, 0, 0, 0, 100)


def test_the_machine_has_free_memory():
    assert 0 < free_memory() == pytest.approx(free_memory(torch.device("cpu")), rel=0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_has_free_memory_of_its_own():
    free, total = torch.cuda.mem_get_info()
    assert 0 < free_memory("cuda") <= total
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert free_memory("cuda") <= free - held.numel() // 2
