"""Where to try first: a prior over places from measurement, which field reports correct."""

from types import MappingProxyType
from typing import Final

from esper.tamiyo.contracts import Site
from esper.tamiyo.experience import Experience

_KIND_PRIOR = MappingProxyType(
    {"attention": 0.03, "stream": 0.03, "mlp": 0.02, "block": 0.015, "conv2d": 0.01, "linear": 0.005, "norm": 0.0}
)
"""Gain at a family of places, as a fraction of the loss; only the differences matter."""

_DEPTH: Final = 1e-3
WIDENING: Final = MappingProxyType({"mlp": "BP-WIDEN", "conv2d": "BP-WIDEN-CONV", "linear": "BP-WIDEN"})
"""What widens a family of host modules, the family to widen first before the others."""


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
        widens = kind != "linear" and WIDENING.get(kind) == blueprint
        return widens, _KIND_PRIOR[kind] + known.place(kind, site.depth) - _DEPTH * site.depth

    return max(sites, key=rank)
