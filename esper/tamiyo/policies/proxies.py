"""Who takes part in a trial: which kinds, where, how large, and what the run can afford."""

from typing import final

from esper.tamiyo.config import TamiyoConfig, params_of
from esper.tamiyo.contracts import Observation, Site
from esper.tamiyo.menu import Menu, Offer, Room
from esper.tamiyo.policies.base import remaining
from esper.tamiyo.policies.priors import WIDENINGS, place


@final
class Proxies:
    """Chooses the proxies of a trial. Holds no state.

    Args:
        config: settings of the controller.
        menu: blueprints that may grow.
    """

    def __init__(self, config: TamiyoConfig, menu: Menu) -> None:
        """Remember both."""
        self.config, self.menu = config, menu

    def choose(self, observation: Observation, trial: int) -> tuple[list[Offer], str]:
        """Return the proxies of trial number `trial`, and what was left out and why."""
        names = self.menu.names(observation.sites)
        kinds = self._promising(observation, names, trial)
        offers = self._sized(observation, kinds)
        affordable = self._affordable(observation, offers)
        said = []
        if len(kinds) < len(names):
            said.append(f"{len(names) - len(kinds)} of {len(names)} kinds left out by what earlier runs found")
        if len(affordable) < len(offers):
            dear = ", ".join(o.blueprint for o in offers if o not in affordable)
            said.append(f"{dear} left out: the search may cost {self.config.overhead:.0%} of the training")
        return affordable, "; ".join(said)

    def _promising(self, observation: Observation, names: tuple[str, ...], trial: int) -> tuple[str, ...]:
        first = place(observation.sites, experience=observation.experience)
        if first is None:
            return names
        priors = [self.menu.library[name].manifest.benefit_prior[0] for name in names]
        seed = 1000 * self.config.seed + trial
        return observation.experience.promising(names, first.shape.layout, seed=seed, priors=priors)

    def _sized(self, observation: Observation, kinds: tuple[str, ...]) -> list[Offer]:
        room = remaining(observation, self.config)
        size = params_of(self.config.proxy, observation.host_params)
        offers = self._offers(observation, kinds, room.at_most(size))
        if offers and not _together(offers, room):
            offers = self._offers(observation, kinds, room.share(len(offers)))
        return offers

    def _offers(self, observation: Observation, kinds: tuple[str, ...], room: Room) -> list[Offer]:
        offers: list[Offer] = []
        for name in kinds:
            site = self._place(observation, name, room)
            if site is not None and (offer := self.menu.offer(site, name, room)) is not None:
                offers.append(_in_next_slot(offer, offers))
        return offers

    def _place(self, observation: Observation, name: str, room: Room) -> Site | None:
        """Return the trial's one site if the kind fits there, else the best site where it does."""
        sites, known = observation.sites, observation.experience
        fitting = tuple(site for site in sites if self.menu.offer(site, name, room) is not None)
        first = place(sites, experience=known) if name not in WIDENINGS else place(fitting, name, known)
        return first if first in fitting else place(fitting, name, known)

    def _affordable(self, observation: Observation, offers: list[Offer]) -> list[Offer]:
        """Leave out the dearest kinds until the trial's work is within the overhead of the run."""
        work = observation.work
        if self.config.overhead is None or not work.known:
            return offers
        left = work.left(self.config.overhead, observation.total_steps)
        kept = list(offers)
        while kept and work.trial([o.cost.macs for o in kept]) > left:
            kept.remove(max(kept, key=lambda o: o.cost.macs))
        return kept


def _together(offers: list[Offer], room: Room) -> bool:
    """Return whether there is room for all offers at once."""
    sums = (sum(numbers) for numbers in zip(*(offer.cost for offer in offers), strict=True))
    return all(used <= left for used, left in zip(sums, room, strict=True))


def _in_next_slot(offer: Offer, taken: list[Offer]) -> Offer:
    """Return the offer in the first slot of its site that no earlier offer of the trial takes."""
    used = {o.site.slot for o in taken if (o.site.path, o.site.chunk) == (offer.site.path, offer.site.chunk)}
    slot = offer.site.slot
    while slot in used:
        slot += 1
    return offer._replace(site=offer.site._replace(slot=slot))
