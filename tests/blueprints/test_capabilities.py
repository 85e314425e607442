"""What not every machine offers is named where it is missing, and nowhere in the way where it is there."""

import pytest

from esper.blueprints import SiteShape, build, cost, load_library, why_not
from esper.blueprints.capabilities import CAPABILITIES, lacking
from esper.blueprints.manifest import parse_manifest
from esper.kasmina.kernels import KernelRequest
from esper.kasmina.library_store import LibraryKernelStore
from esper.leyline.errors import BlueprintDoesNotFit, BlueprintError, KernelError
from esper.tamiyo.contracts import Site
from esper.tamiyo.menu import Menu, Room
from tests.blueprints.growing import capable, one_rank

LIBRARY = load_library()
SITE = SiteShape("btd", 32, 32, 6, "attention")
NEEDS = {"BP-FLASH-ATTN-V2": "flash_attention", "BP-ALL-REDUCE-SHARD": "process_group"}


def test_who_needs_what():
    assert {b.ir.name: b.ir.requires[0] for b in LIBRARY if b.ir.requires} == NEEDS
    assert all(set(b.ir.requires) == set(b.manifest.requires_capability) for b in LIBRARY)
    assert all(LIBRARY[name].manifest.safety_tier == 3 for name in NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_without_it_nothing_is_offered_chosen_or_built(name, monkeypatch):
    monkeypatch.setattr(
        "esper.blueprints.capabilities.CAPABILITIES",
        {key: value._replace(is_offered=lambda: False) for key, value in CAPABILITIES.items()},
    )
    ir, needs = LIBRARY[name].ir, CAPABILITIES[NEEDS[name]].needs
    assert lacking(ir) == [NEEDS[name]]
    assert needs in (why_not(ir, SITE) or "")
    with pytest.raises(BlueprintDoesNotFit, match="that is not offered here, so choose another blueprint"):
        build(ir, SITE, seed=0)
    assert Menu(LIBRARY, [name]).offer(Site("attn", 0, 0, SITE, 0.5, True), name, Room(100_000)) is None
    with pytest.raises(KernelError, match=name):
        LibraryKernelStore().wait(KernelRequest(name, SITE))
    assert cost(ir, SITE).params > 0, "what it would cost can be told anywhere"


def test_with_it_they_are_built(monkeypatch):
    with capable(monkeypatch, "flash_attention"):
        assert why_not(LIBRARY["BP-FLASH-ATTN-V2"].ir, SITE) is None
    with one_rank():
        assert why_not(LIBRARY["BP-ALL-REDUCE-SHARD"].ir, SITE) is None


def test_a_manifest_cannot_name_what_nobody_knows():
    with pytest.raises(BlueprintError, match="unknown capability 'bf17'; known: flash_attention, process_group"):
        parse_manifest(LIBRARY["BP-GLU"].manifest.model_dump() | {"requires_capability": ["bf17"]})
