"""The checker of policies; `esper.testing` offers it to users."""

from collections.abc import Iterable

from esper.blueprints import cost
from esper.leyline.states import SeedCommand, SeedState
from esper.tamiyo.contracts import Observation
from esper.tamiyo.policies.base import Policy, remaining


def check_policy(policy: Policy, observations: Iterable[Observation]) -> None:
    """Check that a policy keeps its contract on the given observations.

    It only germinates, only at offered sites, each seed once, with blueprints of its menu, within the budget, says why,
    and says the same again when asked again.

    Raises:
        AssertionError: the message names what was broken.
    """
    for observation in observations:
        decision, again = policy.propose(observation), policy.propose(observation)
        assert [_content(c) for c in decision.commands] == [_content(c) for c in again.commands], "not deterministic"
        sites = {site.path: site for site in observation.sites}
        targets = [c.target_seed_id for c in decision.commands]
        assert len(set(targets)) == len(targets), f"{targets} names a seed twice"
        assert decision.explanation or not decision.commands, "a decision without an explanation"
        taken = {s.seed_id for s in observation.seeds if s.state is not SeedState.DORMANT}
        assert not taken & set(targets), f"{taken & set(targets)} is not dormant"
        on_menu, total = policy.menu.names(observation.sites), 0
        for command in decision.commands:
            assert command.command is SeedCommand.GERMINATE, f"a policy may only germinate, not {command.command}"
            assert command.target_layer_id in sites, f"{command.target_layer_id} was not offered"
            assert command.blueprint_id in on_menu, f"{command.blueprint_id} is not on the menu"
            total += _params(policy, observation, command.target_layer_id, command.blueprint_id, command.dims)
        room = remaining(observation, policy.config).params
        assert total <= max(room, 0), f"{total} parameters proposed, {room} are left"


def _content(command: object) -> object:
    assert hasattr(command, "model_dump")
    return {k: v for k, v in command.model_dump().items() if k != "command_id"}


def _params(policy: Policy, observation: Observation, path: str, blueprint: str, dims: dict[str, int]) -> int:
    site = next(s for s in observation.sites if s.path == path)
    return cost(policy.menu.library[blueprint].ir, site.shape, dims).params
