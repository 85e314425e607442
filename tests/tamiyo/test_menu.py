"""Offers: what fits, how large, and where it reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints import STANDARD, SiteShape, load_library
from esper.leyline.errors import BlueprintError
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.contracts import Site
from esper.tamiyo.menu import Menu, germinate

MENU = Menu(load_library())
WHOLE = Menu(load_library(), load_library().names())


def site(kind: str, *, same_grid: bool = True, d_in: int = 32, layout: str = "btd") -> Site:
    return Site("block", 0, 0, SiteShape(layout, d_in, 32, 16, kind), 0.5, same_grid)  # type: ignore[arg-type]


@given(st.sampled_from(WHOLE.names), st.integers(1, 20_000))
def test_an_offer_never_exceeds_its_limit(name: str, limit: int) -> None:
    offer = WHOLE.offer(site("attention"), name, limit)
    assert offer is None or 0 <= offer.params <= limit
    assert offer is None or offer.params > 0 or not WHOLE.library[name].ir.trainable


def test_without_a_menu_the_standard_ten_may_grow() -> None:
    assert MENU.names == STANDARD and len(STANDARD) == 10
    assert TamiyoConfig().menu is None
    assert {offer.blueprint for offer in MENU.offers(site("mlp"), 10_000)} <= set(STANDARD)


def test_children_of_blocks_read_the_input_and_others_what_they_declare() -> None:
    def reads(kind: str, **given: bool) -> str:
        offer = MENU.offer(site(kind, **given), "BP-MLP-GELU", 5000)
        assert offer is not None
        return offer.reads

    assert reads("attention") == reads("mlp") == reads("linear") == "input"
    assert reads("stream") == reads("norm") == "output"
    assert reads("attention", same_grid=False) == "output"


def test_widening_needs_an_input_to_read() -> None:
    assert MENU.offer(site("mlp", same_grid=False), "BP-WIDEN", 5000) is None


def test_images_get_convolutions_only() -> None:
    kinds = {offer.blueprint for offer in MENU.offers(site("conv2d", layout="bchw"), 5000)}
    assert "BP-CONV-RES" in kinds
    assert not kinds & {"BP-MLP-GELU", "BP-ATTN-STD", "BP-CONV-CAUSAL"}


def test_the_childs_weights_follow_from_seed_and_place() -> None:
    offer = MENU.offer(site("mlp"), "BP-MLP-GELU", 5000)
    assert offer is not None
    elsewhere = offer._replace(site=offer.site._replace(path="other"))
    seeds = {germinate(offer, seed=0).init_seed, germinate(offer, seed=1).init_seed}
    assert len(seeds | {germinate(elsewhere, seed=0).init_seed}) == 3
    assert germinate(offer, seed=0).init_seed in seeds


def test_an_unknown_blueprint_names_the_near_miss() -> None:
    with pytest.raises(BlueprintError, match="BP-MLP-GELU"):
        Menu(load_library(), ["BP-MLP-GELLU"])
