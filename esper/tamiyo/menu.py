"""Which blueprints fit where, at what size and price."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

from esper.blueprints import STANDARD, BlueprintIR, Library, cost, fit_dims, why_not
from esper.blueprints.ir import Placement
from esper.leyline.commands import KasminaControlCommand
from esper.leyline.errors import BlueprintError
from esper.leyline.states import Reason, SeedCommand
from esper.tamiyo.contracts import Site

_PARALLEL_KINDS = frozenset({"attention", "mlp", "linear"})


class Offer(NamedTuple):
    """A blueprint sized for a site.

    Args:
        site: where.
        blueprint: name.
        reads: placement of the child.
        dims: sizes of the free dimensions.
        params: parameters.
        macs: multiply-accumulates per sample.
    """

    site: Site
    blueprint: str
    reads: Placement
    dims: dict[str, int]
    params: int
    macs: int

    @property
    def seed_id(self) -> str:
        """The seed that would carry it."""
        return f"{self.site.path}#{self.site.chunk}.{self.site.slot}"


class Menu:
    """The blueprints that may grow in a run.

    Args:
        library: where they are defined.
        names: which of them; None takes the standard ones.

    Raises:
        BlueprintError: a name is unknown.
    """

    def __init__(self, library: Library, names: Sequence[str] | None = None) -> None:
        """Check the names."""
        self.library = library
        self.names = tuple(names if names is not None else STANDARD)
        for name in self.names:
            library[name]

    def offer(self, site: Site, blueprint: str, max_params: int) -> Offer | None:
        """Return the largest child of at most `max_params` parameters, or None if none fits or it is under embargo."""
        ir = placed(self.library[blueprint].ir, site)
        if ir is None or blueprint in site.closed or why_not(ir, site.shape) is not None:
            return None
        try:
            dims = fit_dims(ir, site.shape, max_params)
        except BlueprintError:
            return None
        price = cost(ir, site.shape, dims)
        if price.params > max_params:
            return None
        return Offer(site, blueprint, ir.reads, dims, price.params, price.macs)

    def offers(self, site: Site, max_params: int) -> list[Offer]:
        """Return every blueprint of the menu that fits a site, in the menu's order."""
        found = (self.offer(site, name, max_params) for name in self.names)
        return [offer for offer in found if offer is not None]


def placed(ir: BlueprintIR, site: Site) -> BlueprintIR | None:
    """Place a child where the site lets it read: the input of a block, else what the blueprint declares; None nowhere.

    Args:
        ir: the blueprint.
        site: where it may grow.
    """
    readable = site.same_grid and site.shape.d_in > 0
    allowed = (ir.reads, *ir.also_reads)
    parallel = readable and site.shape.kind in _PARALLEL_KINDS and site.shape.layout != "bchw"
    wanted = "input" if parallel and "input" in allowed else ir.reads
    if wanted == "input" and not readable:
        wanted = "output"
    return ir.reading(wanted) if wanted in allowed else None


def germinate(offer: Offer, *, seed: int, group: str = "", strategy: str = "") -> KasminaControlCommand:
    """Return the command that germinates an offer; the child's weights follow from `seed` and its place."""
    return KasminaControlCommand(
        command=SeedCommand.GERMINATE,
        target_layer_id=offer.site.path,
        target_seed_id=offer.seed_id,
        reason=Reason.REQUESTED,
        blueprint_id=offer.blueprint,
        grafting_strategy=strategy,
        dims=offer.dims,
        reads=offer.reads,
        init_seed=zlib.crc32(f"{seed}:{offer.seed_id}:{offer.blueprint}:{sorted(offer.dims.items())}".encode()),
        group=group,
    )
