"""The live trial: find out during the run which kind of network the model lacks, then invest in it.

Measured in the project's first trials: the kind of blueprint matters far more than the place, and the one signal that
ranks kinds well is a short live trial of small proxies, judged by leave-one-out on held-out data.
"""

from typing import final

from esper.leyline.ids import SeedId
from esper.leyline.reports import FieldReport
from esper.leyline.states import SeedState
from esper.tamiyo.config import params_of
from esper.tamiyo.contracts import Decision, Observation, Site
from esper.tamiyo.menu import Offer, germinate
from esper.tamiyo.policies.base import Policy, due, remaining
from esper.tamiyo.policies.priors import WIDENING, place

_TRIAL, _INVEST, _SPREAD = "trial", "invest", "spread"


@final
class Heuristic(Policy):
    """Trial, keep the best, invest the rest of the budget in its kind.

    1. When due, one proxy of every kind of the menu that fits at the site that the prior names (widening at the first
       MLP block), all grafted together and judged by leave-one-out (`gate`).
    2. If the winner's gain stands out, the rest of the budget goes to one more child of its kind at its site.
    3. If nothing stands out: widening spread over the blocks, or nothing, as the config says.
    """

    def propose(self, observation: Observation) -> Decision:
        """Return the next move of the trial, if it is time for one."""
        trials = sorted({r.group for r in observation.reports if r.group.startswith(_TRIAL)})
        if trials and not self._followed(observation, trials[-1]):
            follow = self._follow(observation, trials[-1])
            if follow.commands:
                return follow
        if len(trials) < self.config.trials and due(observation, self.config, len(trials)):
            return self._trial(observation, f"{_TRIAL}-{len(trials)}")
        return Decision()

    def _proxies(self, observation: Observation) -> list[Offer]:
        room = remaining(observation, self.config)
        size = min(params_of(self.config.proxy, observation.host_params), room)
        offers = self._offers(observation.sites, size)
        if offers and sum(offer.params for offer in offers) > room:
            offers = self._offers(observation.sites, room // len(offers))
        return offers

    def _offers(self, sites: tuple[Site, ...], size: int) -> list[Offer]:
        offers: list[Offer] = []
        for name in self.menu.names:
            site = self._place(sites, name, size)
            if site is not None and (offer := self.menu.offer(site, name, size)) is not None:
                offers.append(_in_next_slot(offer, offers))
        return offers

    def _place(self, sites: tuple[Site, ...], name: str, size: int) -> Site | None:
        """Return the trial's one site if the kind fits there, else the best site where it does."""
        fitting = tuple(site for site in sites if self.menu.offer(site, name, size) is not None)
        first = place(sites) if name != WIDENING else place(fitting, name)
        return first if first in fitting else place(fitting, name)

    def _trial(self, observation: Observation, group: str) -> Decision:
        offers = self._proxies(observation)
        if not offers:
            return Decision(explanation="no blueprint of the menu fits within the budget")
        commands = tuple(germinate(offer, seed=self.config.seed, group=group) for offer in offers)
        listed = ", ".join(f"{o.blueprint} ({o.params:,})" for o in offers)
        return Decision(commands, f"{group}: one proxy of every kind that fits, around {offers[0].site.path}: {listed}")

    def _followed(self, observation: Observation, trial: str) -> bool:
        groups = {s.group for s in observation.seeds} | {r.group for r in observation.reports}
        return any(group.startswith((_after(trial, _INVEST), _after(trial, _SPREAD))) for group in groups)

    def _follow(self, observation: Observation, trial: str) -> Decision:
        winner = next((r for r in observation.reports if r.group == trial and _kept(r)), None)
        if winner is not None and self._stands_out(winner):
            return self._invest(observation, winner, _after(trial, _INVEST))
        if self.config.below_standout == "widen":
            return self._spread(observation, _after(trial, _SPREAD))
        return Decision()

    def _stands_out(self, winner: FieldReport) -> bool:
        found, loss = winner.counterfactual, winner.post_metric
        return found is not None and loss is not None and found.lower >= self.config.standout * abs(loss)

    def _invest(self, observation: Observation, winner: FieldReport, group: str) -> Decision:
        layer = SeedId.parse(winner.seed_id).layer
        site = next((s for s in observation.sites if s.path == layer), None)
        name = winner.blueprint_id
        offer = self.menu.offer(site, name, remaining(observation, self.config)) if site else None
        if offer is None:
            return Decision()
        command = germinate(offer, seed=self.config.seed, group=group)
        why = f"{name} stood out in the trial: the rest of the budget, {offer.params:,} parameters, at {offer.seed_id}"
        return Decision((command,), why)

    def _spread(self, observation: Observation, group: str) -> Decision:
        if WIDENING not in self.menu.names:
            return Decision()
        sites = [s for s in observation.sites if s.shape.kind == "mlp"]
        share = remaining(observation, self.config) // max(1, len(sites))
        offers = [o for s in sites if (o := self.menu.offer(s, WIDENING, share)) is not None]
        commands = tuple(germinate(o, seed=self.config.seed, group=f"{group}.{n}") for n, o in enumerate(offers))
        why = f"no kind stood out: {WIDENING} spread over {len(offers)} blocks" if offers else ""
        return Decision(commands, why)

    def foresee(self, observation: Observation) -> list[Offer]:
        """Return the proxies and, for each kind, the child that would follow if it won."""
        if observation.busy:
            return self._investments(observation)
        return self._proxies(observation)

    def _investments(self, observation: Observation) -> list[Offer]:
        budget = params_of(self.config.budget, observation.host_params)
        found = []
        for seed in observation.seeds:
            if seed.group.startswith(_TRIAL) and seed.state is not SeedState.FOSSILIZED:
                layer = SeedId.parse(seed.seed_id).layer
                site = next((s for s in observation.sites if s.path == layer), None)
                kept = sum(s.params for s in observation.seeds if s.state is SeedState.FOSSILIZED)
                left = budget - seed.params - kept
                offer = self.menu.offer(site, seed.blueprint, left) if site else None
                found += [offer] if offer else []
        return found


def _after(trial: str, what: str) -> str:
    return f"{what}-{trial.rpartition('-')[2]}"


def _kept(report: FieldReport) -> bool:
    return report.outcome is SeedState.FOSSILIZED


def _in_next_slot(offer: Offer, taken: list[Offer]) -> Offer:
    """Return the offer in the first slot of its site that no earlier offer of the trial takes."""
    used = {o.site.slot for o in taken if (o.site.path, o.site.chunk) == (offer.site.path, offer.site.chunk)}
    slot = offer.site.slot
    while slot in used:
        slot += 1
    return offer._replace(site=offer.site._replace(slot=slot))
