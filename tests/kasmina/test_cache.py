from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper.blueprints import SiteShape, load_library
from esper.kasmina.cache import KernelCache
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
    assert (cache.hits, cache.misses) == (hits, misses)


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
