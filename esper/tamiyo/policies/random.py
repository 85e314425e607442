"""Grows random kinds at random places: the baseline for every choice."""

import random
from typing import final

from esper.tamiyo.config import params_of
from esper.tamiyo.contracts import Decision, Observation
from esper.tamiyo.menu import Offer, germinate
from esper.tamiyo.policies.base import Policy, due, remaining


@final
class Random(Policy):
    """Every period, one random kind at one random site, with an equal share of the budget."""

    def propose(self, observation: Observation) -> Decision:
        """Draw from a generator seeded by the config's seed and the number of the planting."""
        count = len({s.group for s in observation.seeds} | {r.group for r in observation.reports})
        if count >= self.config.trials or not due(observation, self.config, count):
            return Decision()
        offer = self._draw(observation, count)
        if offer is None:
            return Decision()
        command = germinate(offer, seed=self.config.seed, group=f"random-{count}")
        return Decision((command,), f"{offer.blueprint} at {offer.seed_id} by chance, {offer.params:,} parameters")

    def _draw(self, observation: Observation, count: int) -> Offer | None:
        share = params_of(self.config.budget, observation.host_params) // self.config.trials
        room = remaining(observation, self.config)
        offers = list(self.menu.offers(observation.sites, room.at_most(share)))
        chance = random.Random(f"{self.config.seed}:{count}")
        return chance.choice(offers) if offers else None

    def foresee(self, observation: Observation) -> list[Offer]:
        """Return the next draw."""
        count = len({r.group for r in observation.reports})
        offer = self._draw(observation, count) if count < self.config.trials else None
        return [offer] if offer else []
