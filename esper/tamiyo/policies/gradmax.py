"""Widens where a gradient says so: the baseline for choosing a place without a trial."""

from typing import final

from esper.tamiyo.contracts import Decision, Observation
from esper.tamiyo.menu import Offer, germinate
from esper.tamiyo.policies.base import Policy, due, remaining
from esper.tamiyo.policies.priors import widening

_GROUP = "gradmax-0"


@final
class GradMax(Policy):
    """Once, when due: widens the site with the greatest growth potential, with the whole budget.

    After Evci et al. 2022, "GradMax: Growing Neural Networks using Gradient Information", in its choice by the
    gradient that new units would receive, which telemetry samples at every site (`growth_potential`). It differs from
    the paper in three ways: the place is chosen, not fixed; new units start with random incoming and zero outgoing
    weights, not with those that maximise that gradient; and the gate judges the child as it does any other.
    """

    def propose(self, observation: Observation) -> Decision:
        """Return the one germination when its time has come."""
        done = {s.group for s in observation.seeds} | {r.group for r in observation.reports}
        offers = [] if _GROUP in done or not due(observation, self.config, 0) else self._offers(observation)
        if not offers:
            return Decision()
        potential = potentials(observation)
        best = max(offers, key=lambda offer: potential.get(offer.site.path, 0.0))
        command = germinate(best, seed=self.config.seed, group=_GROUP)
        found = f"the greatest growth potential, {potential.get(best.site.path, 0.0):.3g}"
        return Decision((command,), f"{best.blueprint} at {best.seed_id}, {best.params:,} parameters: {found}")

    def _offers(self, observation: Observation) -> list[Offer]:
        names, room = self.menu.names(observation.sites), remaining(observation, self.config)
        pairs = [(site, widening(site.shape)) for site in observation.sites]
        offers = [self.menu.offer(site, name, room) for site, name in pairs if name in names]
        return [offer for offer in offers if offer is not None]

    def foresee(self, observation: Observation) -> list[Offer]:
        """Return what may be planted at any site."""
        return [] if observation.reports or observation.seeds else self._offers(observation)


def potentials(observation: Observation) -> dict[str, float]:
    """Return the growth potential of each site where it was sampled."""
    packet = observation.packet
    column = packet.site_health.columns.get("growth_potential")
    values = column.numpy().tolist() if column is not None else []
    return {path: value for path, value in zip(packet.site_paths, values, strict=False) if value == value}
