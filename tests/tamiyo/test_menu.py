"""Offers: what fits, how large, and where it reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints import STANDARD, SiteShape, load_library
from esper.blueprints.estimate import Estimate
from esper.blueprints.families import MENUS, family_of
from esper.leyline.errors import BlueprintError
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.contracts import Site
from esper.tamiyo.menu import Menu, Room, germinate

MENU = Menu(load_library())
WHOLE = Menu(load_library(), load_library().names())


def site(kind: str, *, same_grid: bool = True, d_in: int = 32, layout: str = "btd") -> Site:
    return Site("block", 0, 0, SiteShape(layout, d_in, 32, 16, kind), 0.5, same_grid)  # type: ignore[arg-type]


@given(st.sampled_from(load_library().names()), st.integers(1, 20_000))
def test_an_offer_never_exceeds_its_limit(name: str, limit: int) -> None:
    offer = WHOLE.offer(site("attention"), name, Room(limit))
    assert offer is None or 0 <= offer.params <= limit
    assert offer is None or offer.params > 0 or not WHOLE.library[name].ir.trainable


@given(
    st.sampled_from(["BP-MLP-GELU", "BP-ATTN-STD", "BP-CONV-CAUSAL", "BP-WIDEN"]),
    st.floats(1e3, 1e7),
    st.floats(1e-3, 10.0),
    st.floats(1e-3, 1.0),
)
def test_an_offer_stays_within_every_limit(name: str, macs: float, latency_ms: float, memory_mb: float) -> None:
    room = Room(20_000, macs, latency_ms, memory_mb)
    offer = MENU.offer(site("mlp"), name, room)
    if offer is not None:
        assert room.holds(offer.cost)
        free = MENU.offer(site("mlp"), name, Room(20_000))
        assert free is not None and offer.params <= free.params


def test_an_equal_part_leaves_unlimited_what_is_not_limited() -> None:
    assert Room(10, 9.0).share(3) == Room(3, 3.0)
    assert Room(10).at_most(4).params == 4 and Room(10).at_most(None) == Room(10)
    assert not Room(10, memory_mb=1.0).holds(Estimate(1, 1, 1.0, 1.1))


FAMILIES = {
    "transformer": ["attention", "mlp"],
    "recurrent": ["linear", "block"],
    "vision": ["conv2d", "linear"],
    "dense": ["linear"],
}


def hosts_sites(family: str) -> list[Site]:
    layouts = {"conv2d": "bchw"} | ({"linear": "bd"} if family in ("vision", "dense") else {})
    return [site(kind, layout=layouts.get(kind, "btd")) for kind in FAMILIES[family]]


@pytest.mark.parametrize("family", MENUS)
def test_every_family_has_a_menu_that_fits_it(family: str) -> None:
    sites = hosts_sites(family)
    assert family_of(s.shape for s in sites) == family
    assert MENU.names(sites) == MENUS[family]
    fitting = {offer.blueprint for offer in MENU.offers(sites, Room(20_000))}
    assert fitting == set(MENUS[family]) - ({"BP-CONV-RES"} if family == "transformer" else set())


def test_a_menu_that_was_given_is_every_hosts_menu() -> None:
    given = Menu(load_library(), ["BP-CANON"])
    assert given.names(hosts_sites("vision")) == ("BP-CANON",)
    assert MENUS["transformer"] == STANDARD and TamiyoConfig().menu is None


def test_children_of_blocks_read_the_input_and_others_what_they_declare() -> None:
    def reads(kind: str, **given: bool) -> str:
        offer = MENU.offer(site(kind, **given), "BP-MLP-GELU", Room(5000))
        assert offer is not None
        return offer.reads

    assert reads("attention") == reads("mlp") == reads("linear") == "input"
    assert reads("stream") == reads("norm") == "output"
    assert reads("attention", same_grid=False) == "output"


def test_widening_needs_an_input_to_read() -> None:
    assert MENU.offer(site("mlp", same_grid=False), "BP-WIDEN", Room(5000)) is None


def test_images_get_convolutions_only() -> None:
    kinds = {offer.blueprint for offer in MENU.offers([site("conv2d", layout="bchw")], Room(5000))}
    assert "BP-CONV-RES" in kinds
    assert not kinds & {"BP-MLP-GELU", "BP-ATTN-STD", "BP-CONV-CAUSAL"}


def test_the_childs_weights_follow_from_seed_and_place() -> None:
    offer = MENU.offer(site("mlp"), "BP-MLP-GELU", Room(5000))
    assert offer is not None
    elsewhere = offer._replace(site=offer.site._replace(path="other"))
    seeds = {germinate(offer, seed=0).init_seed, germinate(offer, seed=1).init_seed}
    assert len(seeds | {germinate(elsewhere, seed=0).init_seed}) == 3
    assert germinate(offer, seed=0).init_seed in seeds


def test_an_unknown_blueprint_names_the_near_miss() -> None:
    with pytest.raises(BlueprintError, match="BP-MLP-GELU"):
        Menu(load_library(), ["BP-MLP-GELLU"])
