"""Which blueprints fit where, at what size and price."""

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from esper.blueprints import BlueprintIR, Library, SiteShape, fit_dims, why_not
from esper.blueprints.estimate import Estimate
from esper.blueprints.families import MENUS, family_of
from esper.blueprints.ir import Placement
from esper.leyline.commands import KasminaControlCommand
from esper.leyline.errors import BlueprintError
from esper.leyline.states import Reason, SeedCommand
from esper.tamiyo.contracts import Site

_PARALLEL_KINDS = frozenset({"attention", "mlp", "linear"})


class Room(NamedTuple):
    """What growth may still add.

    Args:
        params: parameters.
        macs: multiply-accumulates per sample.
        latency_ms: forward time of 8 samples, in milliseconds.
        memory_mb: memory in training, in MiB.
    """

    params: int
    macs: float = math.inf
    latency_ms: float = math.inf
    memory_mb: float = math.inf

    def holds(self, cost: Estimate) -> bool:
        """Return whether there is room for a child.

        Example:
            >>> Room(100, macs=10).holds(Estimate(100, 11, 0.0, 0.0))
            False
        """
        return all(needed <= left for needed, left in zip(cost, self, strict=True))

    def at_most(self, params: int | None) -> "Room":
        """Return it with no more than so many parameters; None leaves it as it is."""
        return self if params is None else self._replace(params=min(params, self.params))

    def share(self, parts: int) -> "Room":
        """Return an equal part of it."""
        return Room(self.params // parts, *(left / parts for left in self[1:]))


class Offer(NamedTuple):
    """A blueprint sized for a site.

    Args:
        site: where.
        blueprint: name.
        reads: placement of the child.
        dims: sizes of the free dimensions.
        cost: what it costs there.
    """

    site: Site
    blueprint: str
    reads: Placement
    dims: dict[str, int]
    cost: Estimate

    @property
    def params(self) -> int:
        """Parameters of the child."""
        return self.cost.params

    @property
    def seed_id(self) -> str:
        """The seed that would carry it."""
        return f"{self.site.path}#{self.site.chunk}.{self.site.slot}"


class _Size(NamedTuple):
    """What is the same of an offer at all sites that are alike."""

    reads: Placement
    dims: dict[str, int]
    cost: Estimate


class Menu:
    """The blueprints that may grow in a run.

    Args:
        library: where they are defined.
        names: which of them; None takes those of the host's family, see `esper.blueprints.families`.

    Raises:
        BlueprintError: a name is unknown.
    """

    def __init__(self, library: Library, names: Sequence[str] | None = None) -> None:
        """Check the names."""
        self.library = library
        self.given = tuple(names) if names is not None else None
        for name in self.given or ():
            library[name]
        # Many sites are alike, and every boundary asks again.
        self._sizes: dict[tuple[str, SiteShape, bool, Room], _Size | None] = {}

    def names(self, sites: Iterable[Site]) -> tuple[str, ...]:
        """Return the blueprints that may grow in a host with these sites."""
        return self.given if self.given is not None else MENUS[family_of(site.shape for site in sites)]

    def offer(self, site: Site, blueprint: str, room: Room) -> Offer | None:
        """Return the largest child that there is room for, or None if none fits or it is under embargo."""
        if blueprint in site.closed:
            return None
        key = (blueprint, site.shape, site.same_grid, room)
        if key not in self._sizes:
            self._sizes[key] = self._size(site, blueprint, room)
        size = self._sizes[key]
        return Offer(site, blueprint, size.reads, dict(size.dims), size.cost) if size else None

    def _size(self, site: Site, blueprint: str, room: Room) -> _Size | None:
        ir = placed(self.library[blueprint].ir, site)
        if ir is None or why_not(ir, site.shape) is not None:
            return None
        limit = room.params
        while limit > 0:
            try:
                dims = fit_dims(ir, site.shape, limit)
            except BlueprintError:
                return None
            cost = self.library[blueprint].estimate(site.shape, dims, reads=ir.reads)
            if room.holds(cost):
                return _Size(ir.reads, dims, cost)
            limit = min(cost.params - 1, limit * 3 // 4)
        return None

    def offers(self, sites: Sequence[Site], room: Room) -> Iterator[Offer]:
        """Yield every blueprint of the menu at every site where it fits, in the order of the sites and of the menu."""
        names = self.names(sites)
        found = (self.offer(site, name, room) for site in sites for name in names)
        return (offer for offer in found if offer is not None)


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
