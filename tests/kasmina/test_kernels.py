import dataclasses

import pytest

from esper.blueprints import SiteShape
from esper.kasmina.kernels import KernelRequest, KernelStore
from esper.kasmina.library_store import LibraryKernelStore
from esper.leyline.errors import KernelError
from esper.testing import check_store
from tests.kasmina.conftest import InstantStore


@pytest.mark.parametrize("store", [InstantStore, LibraryKernelStore])
@pytest.mark.parametrize("blueprint", ["BP-MLP-GELU", "BP-ATTN-STD", "BP-WIDEN"])
def test_every_store_keeps_the_contract(store, blueprint):
    check_store(store, blueprint)


def test_requests_are_keys():
    site = SiteShape("btd", 8, 8, 4)
    one, two = KernelRequest("A", site, "input", (("h", 4),)), KernelRequest("A", site, "input", (("h", 4),))
    assert one == two
    assert len({one, two, dataclasses.replace(one, dims=(("h", 5),)), dataclasses.replace(one, reads="output")}) == 3


class Forgetful(InstantStore):
    """Offers again what failed."""

    def evict(self, kernel_id):
        pass


class Random(InstantStore):
    """Gives another id every time."""

    def poll(self, request):
        kernel = super().poll(request)
        self.count = getattr(self, "count", 0) + 1
        return dataclasses.replace(kernel, kernel_id=f"{kernel.kernel_id}-{self.count}")


class Once(InstantStore):
    """Forgets its errors."""

    def poll(self, request):
        if getattr(self, "told", False) and "NO-SUCH" in request.blueprint:
            request = dataclasses.replace(request, blueprint="BP-MLP-GELU")
        self.told = "NO-SUCH" in request.blueprint
        return super().poll(request)


@pytest.mark.parametrize(
    ("store", "match"), [(Forgetful, "was offered"), (Random, "another kernel id"), (Once, "was offered")]
)
def test_the_checker_notices_broken_stores(store, match):
    with pytest.raises(AssertionError, match=match):
        check_store(store)


def test_a_store_is_abstract():
    with pytest.raises(TypeError):
        KernelStore()
    with pytest.raises(KernelError):
        InstantStore(failing=frozenset({"BP-MLP-GELU"})).poll(KernelRequest("BP-MLP-GELU", SiteShape("btd", 8, 8, 4)))
