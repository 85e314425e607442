"""The policy `gradmax` widens where telemetry saw the greatest growth potential."""

import math

from esper.blueprints import SiteShape, load_library
from esper.leyline.packets import HealthMap, SystemStatePacket
from esper.leyline.states import SeedState
from esper.tamiyo.checks import check_policy
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.contracts import Observation, SeedStatus, Site
from esper.tamiyo.menu import Menu
from esper.tamiyo.policies import GradMax, make_policy

SITES = tuple(Site(path, 0, 0, SiteShape("btd", 64, 64, 128, "mlp"), 0.0, True) for path in ("a", "b", "c"))
STREAM = Site("s", 0, 0, SiteShape("btd", 64, 64, 128, "stream"), 0.0, True)


def policy(**given: object) -> GradMax:
    config = TamiyoConfig.of({"policy": "gradmax", "budget": 9_000} | given)
    made = make_policy(config, Menu(load_library(), config.menu))
    assert isinstance(made, GradMax)
    return made


def observed(*potential: float, step: int = 300, seeds: tuple[SeedStatus, ...] = ()) -> Observation:
    paths = ("s", "a", "b", "c")[: len(potential)]
    health = HealthMap.of(growth_potential=list(potential)) if potential else HealthMap()
    packet = SystemStatePacket(
        run_id="r", current_epoch=0, global_step=step, validation_loss=2.0, site_paths=paths, site_health=health
    )
    return Observation(packet, seeds, (STREAM, *SITES), (), total_steps=2400, host_params=98_416)


def test_it_widens_the_site_with_the_greatest_potential_with_the_whole_budget() -> None:
    check_policy(policy(), [observed(9.0, 0.1, 3.0, 0.2), observed()])
    decision = policy().propose(observed(9.0, 0.1, 3.0, math.nan))
    (command,) = decision.commands
    assert (command.blueprint_id, command.target_layer_id) == ("BP-WIDEN", "b")
    assert command.dims["h"] == 9_000 // 129 and "growth potential, 3" in decision.explanation


def test_it_waits_for_its_time_and_plants_once() -> None:
    assert not policy().propose(observed(0.0, 1.0, step=100)).commands
    planted = SeedStatus("b#0.0", SeedState.GRAFTING, False, "BP-WIDEN", "gradmax-0", 100)
    assert not policy().propose(observed(0.0, 1.0, seeds=(planted,))).commands
    assert not policy(menu=("BP-MLP-GELU",)).propose(observed(0.0, 1.0)).commands


def test_it_foresees_what_it_may_plant() -> None:
    assert [offer.site.path for offer in policy().foresee(observed(step=1))] == ["a", "b", "c"]
