"""The live trial: find out during the run which kind of network the model lacks, then invest in it.

Measured in the project's first trials: the kind of blueprint matters far more than the place, and the one signal that
ranks kinds well is a short live trial of small proxies, judged by leave-one-out on held-out data.
"""

from typing import final

from esper.leyline.commands import SPREAD
from esper.leyline.ids import SeedId
from esper.leyline.reports import FieldReport
from esper.leyline.states import SeedState
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.contracts import Decision, Observation, SeedStatus
from esper.tamiyo.menu import Menu, Offer, germinate
from esper.tamiyo.policies.base import Policy, due, remaining
from esper.tamiyo.policies.priors import WIDENED, spreading, widening
from esper.tamiyo.policies.proxies import Proxies

_TRIAL, _INVEST = "trial", "invest"


@final
class Heuristic(Policy):
    """Trial, keep the best, invest the rest of the budget in its kind; stop when nothing on the menu is worth it.

    1. When due, one proxy of every kind of the menu that fits at the site that the prior names (widening at the first
       block that it widens), all grafted together and judged by leave-one-out (`gate`). Kinds that earlier runs found
       wanting, and those that the run cannot afford to try, are left out (`Proxies`).
    2. If the winner's gain stands out, an equal part of the budget goes to one more child of its kind at its site.
    3. If nothing stands out: widening spread over the blocks and judged as one at the end of the run, or nothing, as
       the config says; and no further trial, because what was not worth its price at this size of the model will not be
       at a larger one.
    """

    def __init__(self, config: TamiyoConfig, menu: Menu) -> None:
        """Remember both."""
        super().__init__(config, menu)
        self.proxies = Proxies(config, menu)

    def propose(self, observation: Observation) -> Decision:
        """Return the next move of the trial, if it is time for one."""
        trials = _trials(observation)
        if trials and not self._followed(observation, trials[-1]):
            follow = self._follow(observation, trials[-1])
            if follow.commands:
                return follow
        if self._goes_on(observation, trials) and due(observation, self.config, len(trials)):
            return self._trial(observation, len(trials))
        return Decision()

    def _goes_on(self, observation: Observation, trials: list[str]) -> bool:
        """Return whether there may be another trial: there always may be a first, and one after a winner."""
        if len(trials) >= self.config.trials:
            return False
        return not trials or self._winner(observation, trials[-1]) is not None

    def _trial(self, observation: Observation, number: int) -> Decision:
        offers, left_out = self.proxies.choose(observation, number)
        if not offers:
            why = "no blueprint of the menu fits within the budget"
            return Decision(explanation=f"{why}; {left_out}" if left_out else why)
        group = f"{_TRIAL}-{number}"
        commands = tuple(germinate(offer, seed=self.config.seed, group=group) for offer in offers)
        listed = ", ".join(f"{o.blueprint} ({o.params:,})" for o in offers)
        why = f"{group}: one proxy of every kind that fits, around {offers[0].site.path}: {listed}"
        return Decision(commands, f"{why}; {left_out}" if left_out else why)

    def _followed(self, observation: Observation, trial: str) -> bool:
        groups = {s.group for s in observation.seeds} | {r.group for r in observation.reports}
        return any(group.startswith((_after(trial, _INVEST), _after(trial, SPREAD))) for group in groups)

    def _follow(self, observation: Observation, trial: str) -> Decision:
        winner = self._winner(observation, trial)
        if winner is not None:
            return self._invest(observation, winner, _after(trial, _INVEST))
        if self.config.below_standout == "widen":
            return self._spread(observation, _after(trial, SPREAD))
        return Decision()

    def _winner(self, observation: Observation, trial: str) -> FieldReport | None:
        """Return the report of the proxy that was kept, if its gain stands out."""
        kept = next((r for r in observation.reports if r.group == trial and _kept(r)), None)
        if kept is None or kept.counterfactual is None or kept.post_metric is None:
            return None
        stands_out = kept.counterfactual.lower >= self.config.standout * abs(kept.post_metric)
        return kept if stands_out else None

    def _invest(self, observation: Observation, winner: FieldReport, group: str) -> Decision:
        layer = SeedId.parse(winner.seed_id).layer
        site = next((s for s in observation.sites if s.path == layer), None)
        name = winner.blueprint_id
        room = remaining(observation, self.config).share(self._points_left(observation))
        offer = self.menu.offer(site, name, room) if site else None
        if offer is None:
            return Decision()
        command = germinate(offer, seed=self.config.seed, group=group)
        part = "the rest of the budget" if self._points_left(observation) == 1 else "an equal part of the budget"
        why = f"{name} stood out in the trial: {part}, {offer.params:,} parameters, at {offer.seed_id}"
        return Decision((command,), why)

    def _points_left(self, observation: Observation) -> int:
        """Return over how many growth points the rest of the budget is to be spread, this one included."""
        begun = {s.group for s in observation.seeds if s.group.startswith(_TRIAL)}
        return max(1, self.config.trials - len(begun.union(_trials(observation))) + 1)

    def _spread(self, observation: Observation, group: str) -> Decision:
        kinds = {s.shape.kind for s in observation.sites if widening(s.shape)}
        first = next((kind for kind in WIDENED if kind in kinds), "")
        sites = [s for s in observation.sites if s.shape.kind == first and widening(s.shape)]
        if not sites or widening(sites[0].shape) not in self.menu.names(observation.sites):
            return Decision()
        name = spreading(sites[0].shape)
        room = remaining(observation, self.config).share(len(sites))
        offers = [o for s in sites if (o := self.menu.offer(s, name, room)) is not None]
        commands = tuple(germinate(o, seed=self.config.seed, group=group) for o in offers)
        why = f"no kind stood out: {name} spread over {len(offers)} blocks, judged as one at the end" if offers else ""
        return Decision(commands, why)

    def foresee(self, observation: Observation) -> list[Offer]:
        """Return the proxies and, for each kind, the child that would follow if it won."""
        if observation.busy:
            return self._investments(observation)
        trials = _trials(observation)
        return self.proxies.choose(observation, len(trials))[0] if self._goes_on(observation, trials) else []

    def _investments(self, observation: Observation) -> list[Offer]:
        on_trial = [s for s in observation.seeds if s.group.startswith(_TRIAL) and s.state is not SeedState.FOSSILIZED]
        offers = (self._investment(observation, seed) for seed in on_trial)
        return [offer for offer in offers if offer is not None]

    def _investment(self, observation: Observation, winner: SeedStatus) -> Offer | None:
        """Return what would follow if a proxy won, and the others of its trial were gone."""
        layer = SeedId.parse(winner.seed_id).layer
        site = next((s for s in observation.sites if s.path == layer), None)
        stay = tuple(s for s in observation.seeds if s is winner or s.state is SeedState.FOSSILIZED)
        room = remaining(observation._replace(seeds=stay), self.config).share(self._points_left(observation))
        return self.menu.offer(site, winner.blueprint, room) if site else None


def _trials(observation: Observation) -> list[str]:
    return sorted({r.group for r in observation.reports if r.group.startswith(_TRIAL)})


def _after(trial: str, what: str) -> str:
    return f"{what}-{trial.rpartition('-')[2]}"


def _kept(report: FieldReport) -> bool:
    return report.outcome is SeedState.FOSSILIZED
