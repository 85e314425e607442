"""Children that are there from the first step, spread over a network within a budget of parameters."""

from collections.abc import Callable, Sequence
from typing import Any, Final

from esper.blueprints import SiteShape, load_library
from esper.tamiyo.contracts import Site
from esper.tamiyo.menu import Menu, Offer, Room, germinate
from esper.tamiyo.policies.priors import WIDENED, widening

LORA: Final = "BP-PROJ-LORA"
GENERAL: Final = "BP-MLP-GELU"
GENERAL_IMAGE: Final = "BP-CONV-RES"

_NO_LIMIT: Final = 1 << 40


def site_of(told: dict[str, Any]) -> Site:
    """Return a site from what a row tells of it: `path`, `shape`, `depth`, `same_grid`."""
    return Site(told["path"], 0, 0, SiteShape(**told["shape"]), told["depth"], told["same_grid"])


def widened(sites: Sequence[Site]) -> list[Site]:
    """Return the sites that widening is spread over: blocks where there are any, else single layers.

    Example:
        >>> block = Site("ffn", 0, 0, SiteShape("btd", 8, 8, 4, "mlp"), 0.0, True)
        >>> layer = Site("head", 0, 0, SiteShape("btd", 8, 8, 4, "linear"), 1.0, True)
        >>> [site.path for site in widened([block, layer])]
        ['ffn']
    """
    fit = [site for site in sites if widening(site.shape)]
    kinds = {site.shape.kind for site in fit}
    first = next((kind for kind in WIDENED if kind in kinds), "")
    return [site for site in fit if site.shape.kind == first]


def general_kind(sites: Sequence[Site]) -> str:
    """Return one kind that anybody would try: a perceptron, or a convolution on images."""
    images = bool(sites) and all(site.shape.layout == "bchw" for site in sites)
    return GENERAL_IMAGE if images else GENERAL


def spread(sites: Sequence[Site], kind: Callable[[Site], str], budget: int, *, seed: int) -> list[dict[str, Any]]:
    """Return one child for every site that takes its kind, as `esper.tolaria.from_start.FromStart` takes them.

    The budget is shared equally; what a site leaves of its share goes to those after it.

    Args:
        sites: where.
        kind: name of the blueprint for a site.
        budget: parameters of all children together.
        seed: seed of their weights.

    Example:
        >>> sites = [Site(name, 0, 0, SiteShape("bd", 16, 16, 1, "linear"), 0.0, True) for name in ("a", "b")]
        >>> [(child["site"], child["dims"]) for child in spread(sites, lambda site: LORA, 200, seed=0)]
        [('a', {'r': 3}), ('b', {'r': 3})]
    """
    menu, found, left = Menu(load_library()), [], budget
    fit = [site for site in sites if menu.offer(site, kind(site), Room(_NO_LIMIT)) is not None]
    for index, site in enumerate(fit):
        offer = menu.offer(site, kind(site), Room(left // (len(fit) - index)))
        if offer is not None:
            found.append(_child(offer, seed))
            left -= offer.params
    return found


def _child(offer: Offer, seed: int) -> dict[str, Any]:
    return {
        "site": offer.site.path,
        "slot": "c0s0",
        "blueprint": offer.blueprint,
        "reads": offer.reads,
        "dims": offer.dims,
        "shape": offer.site.shape._asdict(),
        "start": 0,
        "width": None,
        "init_seed": germinate(offer, seed=seed).init_seed,
    }
