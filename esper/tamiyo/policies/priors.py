"""Where to try first: a prior over places from measurement, which field reports correct."""

from types import MappingProxyType
from typing import Final

from esper.blueprints import SiteShape
from esper.tamiyo.contracts import Site
from esper.tamiyo.experience import Experience

_KIND_PRIOR = MappingProxyType(
    {"attention": 0.03, "stream": 0.03, "mlp": 0.02, "block": 0.015, "conv2d": 0.01, "linear": 0.005, "norm": 0.0}
)
"""Gain at a family of places, as a fraction of the loss; only the differences matter."""

_DEPTH: Final = 1e-3
WIDENINGS: Final = ("BP-WIDEN", "BP-WIDEN-CONV")
WIDENED: Final = ("mlp", "block", "conv2d", "linear")
"""Families of host modules that can be widened, the first to be widened first."""


def widening(shape: SiteShape) -> str:
    """Return what widens a place, or nothing.

    Example:
        >>> widening(SiteShape("bchw", 8, 8, 16, "block")), widening(SiteShape("btd", 8, 8, 16, "attention"))
        ('BP-WIDEN-CONV', '')
    """
    if shape.layout == "bchw":
        return "BP-WIDEN-CONV" if shape.kind in ("block", "conv2d") else ""
    return "BP-WIDEN" if shape.kind in ("mlp", "linear") else ""


def spreading(shape: SiteShape) -> str:
    """Return what is spread over the blocks where no kind stood out: on tokens, widening with gated units.

    Gated units are the better feed-forward part at equal size (Shazeer, 2020, arXiv 2002.05202).

    Example:
        >>> spreading(SiteShape("btd", 8, 8, 16, "mlp")), spreading(SiteShape("bd", 8, 8, 1, "linear"))
        ('BP-WIDEN-SWIGLU', 'BP-WIDEN')
    """
    name = widening(shape)
    return "BP-WIDEN-SWIGLU" if name == "BP-WIDEN" and shape.layout == "btd" else name


def place(sites: tuple[Site, ...], blueprint: str = "", experience: Experience | None = None) -> Site | None:
    """Return the site to try a blueprint at: the earliest of the best family; widening goes to what it widens first.

    Args:
        sites: where it may grow.
        blueprint: what.
        experience: what grafts of earlier runs gained at such places; None is none.
    """
    if not sites:
        return None
    known = experience or Experience()

    def rank(site: Site) -> tuple[bool, float]:
        kind = site.shape.kind
        widens = kind != "linear" and blueprint != "" and widening(site.shape) == blueprint
        return widens, _KIND_PRIOR[kind] + known.place(kind, site.depth) - _DEPTH * site.depth

    return max(sites, key=rank)
