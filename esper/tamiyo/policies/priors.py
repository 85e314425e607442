"""Where to try first: a prior over sites, from measurement and for field reports to correct."""

from types import MappingProxyType

from esper.tamiyo.contracts import Site

_KIND_PRIOR = MappingProxyType(
    {"attention": 3.0, "stream": 3.0, "mlp": 2.0, "block": 1.5, "conv2d": 1.0, "linear": 0.5, "norm": 0.0}
)
WIDENING = "BP-WIDEN"


def place(sites: tuple[Site, ...], blueprint: str = "") -> Site | None:
    """Return the site to try a blueprint at: the earliest of the best family; widening goes to MLP blocks first."""
    if not sites:
        return None

    def rank(site: Site) -> tuple[float, float]:
        prior = _KIND_PRIOR[site.shape.kind]
        if blueprint == WIDENING and site.shape.kind == "mlp":
            prior = 10.0
        return prior, -site.depth

    return max(sites, key=rank)
