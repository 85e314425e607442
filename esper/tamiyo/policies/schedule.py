"""Grows fixed kinds at fixed places and times."""

from fnmatch import fnmatchcase
from typing import final

from esper.leyline.errors import ConfigError
from esper.tamiyo.config import Planting, TamiyoConfig, steps_of
from esper.tamiyo.contracts import Decision, Observation
from esper.tamiyo.menu import Menu, Offer, germinate
from esper.tamiyo.policies.base import Policy, remaining


@final
class Schedule(Policy):
    """Plants the entries of `config.schedule`, each once, in order."""

    def __init__(self, config: TamiyoConfig, menu: Menu) -> None:
        """Check that there is something to plant, and that each blueprint is known."""
        super().__init__(config, menu)
        if not config.schedule:
            raise ConfigError("policy 'schedule' needs entries; set tamiyo.settings.schedule or another policy.")
        for planting in config.schedule:
            menu.library[planting.blueprint]

    def propose(self, observation: Observation) -> Decision:
        """Plant the next entry when its time has come."""
        done = {s.group for s in observation.seeds} | {r.group for r in observation.reports}
        unfit = []
        for number, planting in enumerate(self.config.schedule):
            group = f"schedule-{number}"
            if group in done or observation.step < steps_of(planting.at, observation.total_steps):
                continue
            if (offer := self._offer(observation, planting)) is not None:
                return self._plant(offer, planting, group)
            unfit.append(f"{planting.blueprint} fits no site {planting.site!r} within the budget")
        return Decision(explanation="; ".join(unfit))

    def _plant(self, offer: Offer, planting: Planting, group: str) -> Decision:
        command = germinate(offer, seed=self.config.seed, group=group)
        return Decision((command,), f"{planting.blueprint} at {offer.seed_id} by schedule, {offer.params:,} parameters")

    def _offer(self, observation: Observation, planting: Planting) -> Offer | None:
        room = remaining(observation, self.config).at_most(planting.params)
        sites = (site for site in observation.sites if fnmatchcase(site.path, planting.site))
        offers = (self.menu.offer(site, planting.blueprint, room) for site in sites)
        return next((offer for offer in offers if offer is not None), None)

    def foresee(self, observation: Observation) -> list[Offer]:
        """Return every entry's offer."""
        offers = (self._offer(observation, planting) for planting in self.config.schedule)
        return [offer for offer in offers if offer is not None]
