"""Policies: pure, within the budget, and doing what each says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints import SiteShape, cost, load_library
from esper.leyline.errors import EsperError
from esper.leyline.packets import SystemStatePacket
from esper.leyline.reports import Counterfactual, FieldReport, SiteInfo
from esper.leyline.states import Reason, SeedCommand, SeedState
from esper.tamiyo.checks import check_policy
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.contracts import Observation, SeedStatus, Site
from esper.tamiyo.experience import Experience
from esper.tamiyo.menu import Menu, Room
from esper.tamiyo.policies import POLICIES, make_policy
from esper.tamiyo.policies.base import on_plateau, remaining
from esper.tamiyo.policies.priors import place
from esper.tamiyo.work import Work

LIBRARY = load_library()
STREAM = Site("blocks.0.after_attn", 0, 0, SiteShape("btd", 64, 64, 128, "stream"), 0.0, True)
FFN = Site("blocks.0.ffn", 0, 0, SiteShape("btd", 64, 64, 128, "mlp"), 0.2, True)
LATE = Site("blocks.2.after_attn", 0, 0, SiteShape("btd", 64, 64, 128, "stream"), 0.8, True)
SITES = (STREAM, FFN, LATE)


def observed(
    step: int = 300, *, seeds: tuple[SeedStatus, ...] = (), reports: tuple[FieldReport, ...] = (), **given: object
) -> Observation:
    packet = SystemStatePacket(run_id="r", current_epoch=0, global_step=step, validation_loss=2.0)
    return Observation(packet, seeds, SITES, reports, total_steps=2400, host_params=98_416, **given)  # type: ignore[arg-type]


PLACE = SiteInfo(
    module_path="blocks.0.after_attn", module_type="Identity", layout="btd", width=64, input_width=64, depth=0
)


def report(blueprint: str, group: str, *, kept: bool, lower: float, seed_id: str = f"{STREAM.path}#0.1") -> FieldReport:
    return FieldReport(
        run_id="r",
        blueprint_id=blueprint,
        seed_id=seed_id,
        site=PLACE,
        post_metric=2.0,
        counterfactual=Counterfactual(mean=lower, lower=lower, upper=lower, n=32),
        outcome=SeedState.FOSSILIZED if kept else SeedState.CULLED,
        reason=Reason.GATE_PASSED if kept else Reason.OUTCOMPETED,
        group=group,
    )


def policy(name: str, **given: object) -> object:
    config = TamiyoConfig.of({"policy": name, "budget": 16_000} | given)
    return make_policy(config, Menu(LIBRARY, config.menu))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_the_contract(name: str) -> None:
    schedule = ({"at": 0.1, "blueprint": "BP-MLP-GELU"},) if name == "schedule" else ()
    check_policy(policy(name, schedule=schedule), [observed(step) for step in (0, 300, 1200)])  # type: ignore[arg-type]


def test_the_trial_plants_one_proxy_of_every_kind_that_fits() -> None:
    decision = policy("heuristic").propose(observed())  # type: ignore[attr-defined]
    kinds = [c.blueprint_id for c in decision.commands]
    assert len(set(kinds)) == len(kinds) >= 7
    assert "BP-CONV-RES" not in kinds  # it needs images
    assert {c.target_layer_id for c in decision.commands if c.blueprint_id != "BP-WIDEN"} == {"blocks.0.after_attn"}
    assert {c.target_layer_id for c in decision.commands if c.blueprint_id == "BP-WIDEN"} == {"blocks.0.ffn"}
    assert len({c.target_seed_id for c in decision.commands}) == len(kinds)


def test_the_trial_waits_for_its_time() -> None:
    assert policy("heuristic").propose(observed(200)).commands == ()  # type: ignore[attr-defined]
    assert policy("heuristic", start=200).propose(observed(200)).commands  # type: ignore[attr-defined]


@given(st.integers(500, 100_000), st.floats(0.001, 0.5))
def test_a_trial_never_exceeds_the_budget(budget: int, proxy: float) -> None:
    check_policy(make_policy(TamiyoConfig(budget=budget, proxy=proxy), Menu(LIBRARY)), [observed()])


def test_a_winner_that_stands_out_gets_the_rest_of_the_budget() -> None:
    won = report("BP-CONV-CAUSAL", "trial-0", kept=True, lower=0.2)
    kept = SeedStatus("blocks.0.after_attn#0.1", SeedState.FOSSILIZED, False, "BP-CONV-CAUSAL", "trial-0", 1_500)
    decision = policy("heuristic").propose(observed(500, seeds=(kept,), reports=(won,)))  # type: ignore[attr-defined]
    (command,) = decision.commands
    assert (command.command, command.blueprint_id) == (SeedCommand.GERMINATE, "BP-CONV-CAUSAL")
    assert command.target_layer_id == "blocks.0.after_attn"
    assert "the rest of the budget" in decision.explanation


def test_below_the_threshold_widening_is_spread_or_nothing_is_added() -> None:
    won = report("BP-MLP-GELU", "trial-0", kept=True, lower=0.001)
    spread = policy("heuristic").propose(observed(500, reports=(won,)))  # type: ignore[attr-defined]
    assert [c.blueprint_id for c in spread.commands] == ["BP-WIDEN-SWIGLU"]
    nothing = policy("heuristic", below_standout="nothing").propose(observed(500, reports=(won,)))  # type: ignore[attr-defined]
    assert nothing.commands == ()


def test_widening_is_spread_over_what_it_widens_in_each_family() -> None:
    def images(path: str, kind: str) -> Site:
        return Site(path, 0, 0, SiteShape("bchw", 16, 16, 64, kind), 0.0, True)

    lost = report("BP-MLP-GELU", "trial-0", kept=False, lower=0.0)
    for sites, kind in (
        ((images("a", "conv2d"), images("b", "conv2d"), images("n", "norm")), "BP-WIDEN-CONV"),
        ((images("a", "block"), images("n", "norm")), "BP-WIDEN-CONV"),
        ((Site("a", 0, 0, SiteShape("bd", 16, 16, 1, "linear"), 0.0, True),), "BP-WIDEN"),
    ):
        spread = policy("heuristic").propose(observed(500, reports=(lost,))._replace(sites=sites))  # type: ignore[attr-defined]
        assert {c.blueprint_id for c in spread.commands} == {kind}
        assert {c.target_layer_id for c in spread.commands} == {s.path for s in sites if s.shape.kind != "norm"}


def test_blocks_are_widened_before_single_layers() -> None:
    narrow = Site("convs.1", 0, 0, SiteShape("bchw", 16, 16, 64, "block"), 0.9, True)
    plain = Site("convs.2", 0, 0, SiteShape("bchw", 16, 16, 64, "conv2d"), 0.1, True)
    assert place((plain, narrow), "BP-WIDEN-CONV") == narrow
    assert place((LATE, FFN), "BP-WIDEN") == FFN and place((LATE, FFN)) == LATE


def test_the_growth_points_share_the_budget() -> None:
    won = report("BP-CONV-CAUSAL", "trial-0", kept=True, lower=0.2)

    def invested(trials: int) -> int:
        decision = policy("heuristic", trials=trials).propose(observed(500, reports=(won,)))  # type: ignore[attr-defined]
        (command,) = decision.commands
        return cost(LIBRARY["BP-CONV-CAUSAL"].ir, STREAM.shape, command.dims).params

    assert invested(1) > 15_000 and 4_500 < invested(3) <= 16_000 // 3


def test_no_trial_follows_one_at_which_nothing_stood_out() -> None:
    def proposed(lower: float) -> tuple[object, ...]:
        trial = report("BP-CONV-CAUSAL", "trial-0", kept=True, lower=lower)
        after = report("BP-CONV-CAUSAL", "invest-0" if lower > 0.1 else "spread-0", kept=True, lower=0.1)
        heuristic = policy("heuristic", trials=2, budget=60_000)
        return heuristic.propose(observed(1200, reports=(trial, after))).commands  # type: ignore[attr-defined, no-any-return]

    assert proposed(0.2) and not proposed(0.001)


def test_a_trial_leaves_out_what_the_run_cannot_afford() -> None:
    def kinds(host: float, overhead: float | None) -> list[str]:
        work = Work(host=host, batch=8, trial_steps=120, judged_on=32)
        decision = policy("heuristic", overhead=overhead).propose(observed(work=work))  # type: ignore[attr-defined]
        return [c.blueprint_id for c in decision.commands]

    every = kinds(12e6, None)
    assert kinds(12e6, 0.2) == every  # what task C costs
    some = kinds(12e6, 0.01)
    assert set(some) < set(every) and "BP-ATTN-STD" not in some  # the dearest goes first
    assert kinds(12e6, 1e-6) == []
    assert kinds(0.0, 0.01) == every  # the host's work is not known


def test_a_trial_leaves_out_what_earlier_runs_found_wanting_and_goes_where_they_gained_most() -> None:
    def earlier(run: int, blueprint: str, gain: float, kind: str = "stream", depth: float = 0.0) -> FieldReport:
        place = PLACE.model_copy(update={"depth": depth})
        found = Counterfactual(mean=gain, lower=gain - 0.001, upper=gain + 0.001, n=32)
        seed_id = f"{kind}{depth}#0.0"
        return report(blueprint, "trial-0", kept=False, lower=0.0, seed_id=seed_id).model_copy(
            update={"run_id": f"r{run}", "site": place, "site_kind": kind, "counterfactual": found}
        )

    names = Menu(LIBRARY).names(SITES)
    seen = [earlier(run, name, 0.1 if name == "BP-CONV-CAUSAL" else 0.0) for run in range(4) for name in names]
    decision = policy("heuristic").propose(observed(experience=Experience.of(seen)))  # type: ignore[attr-defined]
    assert [c.blueprint_id for c in decision.commands] == ["BP-CONV-CAUSAL"]
    assert f"{len(names) - 1} of {len(names)} kinds left out" in decision.explanation
    better = [earlier(9 + run, "BP-CONV-CAUSAL", 0.3, "mlp", 0.2) for run in range(4)]
    moved = policy("heuristic").propose(observed(experience=Experience.of([*seen, *better])))  # type: ignore[attr-defined]
    assert {c.target_layer_id for c in moved.commands} == {FFN.path}


def test_after_the_investment_the_policy_rests() -> None:
    reports = (
        report("BP-CONV-CAUSAL", "trial-0", kept=True, lower=0.2),
        report("BP-CONV-CAUSAL", "invest-0", kept=True, lower=0.1, seed_id="blocks.0.after_attn#0.0"),
    )
    assert policy("heuristic").propose(observed(2000, reports=reports)).commands == ()  # type: ignore[attr-defined]


def test_the_policy_foresees_what_it_will_need() -> None:
    heuristic = policy("heuristic")
    proxies = {(o.blueprint, tuple(o.dims.items())) for o in heuristic.foresee(observed(100))}  # type: ignore[attr-defined]
    planted = {(c.blueprint_id, tuple(c.dims.items())) for c in heuristic.propose(observed(300)).commands}  # type: ignore[attr-defined]
    assert planted <= proxies


@pytest.mark.parametrize("trials", [1, 3])
def test_the_investment_that_is_foreseen_during_a_trial_is_the_one_that_follows(trials: int) -> None:
    heuristic = policy("heuristic", trials=trials)
    planted = heuristic.propose(observed(300)).commands  # type: ignore[attr-defined]
    costs = {c.target_seed_id: sum(c.dims.values()) for c in planted}
    seeds = tuple(
        SeedStatus(c.target_seed_id, SeedState.GRAFTING, True, c.blueprint_id, c.group, 100 + costs[c.target_seed_id])
        for c in planted
    )
    foreseen = {o.blueprint: (o.site.path, o.dims) for o in heuristic.foresee(observed(350, seeds=seeds))}  # type: ignore[attr-defined]
    winner = next(s for s in seeds if s.blueprint == "BP-CONV-CAUSAL")
    won = report(winner.blueprint, winner.group, kept=True, lower=0.2, seed_id=winner.seed_id)
    ended = tuple(s._replace(state=SeedState.FOSSILIZED if s is winner else SeedState.CULLED) for s in seeds)
    (invested,) = heuristic.propose(observed(500, seeds=ended, reports=(won,))).commands  # type: ignore[attr-defined]
    assert foreseen["BP-CONV-CAUSAL"] == (invested.target_layer_id, dict(invested.dims))


def test_chance_is_reproducible_and_moves_with_the_seed() -> None:
    def drawn(seed: int) -> tuple[str, str]:
        (command,) = policy("random", seed=seed).propose(observed()).commands  # type: ignore[attr-defined]
        return command.blueprint_id, command.target_seed_id

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(20)}) > 5


def test_the_schedule_plants_each_entry_once() -> None:
    first_entry = {"at": 100, "blueprint": "BP-MLP-GELU", "site": "*.ffn", "params": 900}
    entries = [first_entry, {"at": 0.5, "blueprint": "BP-PROJ-LORA"}]
    schedule = policy("schedule", schedule=entries)
    (first,) = schedule.propose(observed(150)).commands  # type: ignore[attr-defined]
    assert (first.target_layer_id, first.group) == ("blocks.0.ffn", "schedule-0")
    done = report("BP-MLP-GELU", "schedule-0", kept=False, lower=0.0)
    assert schedule.propose(observed(150, reports=(done,))).commands == ()  # type: ignore[attr-defined]
    (second,) = schedule.propose(observed(1200, reports=(done,))).commands  # type: ignore[attr-defined]
    assert second.blueprint_id == "BP-PROJ-LORA"


def test_one_entry_that_fits_nowhere_does_not_hold_up_the_next() -> None:
    entries = [{"at": 0.0, "blueprint": "BP-CONV-RES"}, {"at": 0.0, "blueprint": "BP-PROJ-LORA"}]
    (command,) = policy("schedule", schedule=entries).propose(observed()).commands  # type: ignore[attr-defined]
    assert command.blueprint_id == "BP-PROJ-LORA"
    only = policy("schedule", schedule=entries[:1]).propose(observed())  # type: ignore[attr-defined]
    assert "BP-CONV-RES fits no site" in only.explanation


def test_a_schedule_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(EsperError, match="needs entries"):
        policy("schedule")
    with pytest.raises(EsperError, match="BP-MLP-GELU"):
        policy("schedule", schedule=({"at": 1, "blueprint": "BP-MLP-GELUU"},))


def test_what_was_removed_no_longer_counts_against_the_budget() -> None:
    gone = SeedStatus("blocks.0.ffn#0.0", SeedState.CULLED, False, "BP-WIDEN", "trial-0", 9_000)
    kept = gone._replace(seed_id="blocks.0.ffn#0.1", state=SeedState.FOSSILIZED, params=1_000)
    assert remaining(observed(seeds=(gone, kept)), TamiyoConfig(budget=16_000)) == Room(15_000)


def test_work_and_memory_are_budgets_too() -> None:
    kept = SeedStatus("a#0.0", SeedState.FOSSILIZED, False, "BP-WIDEN", "", 1_000, 500, 0.5, 2.0)
    config = TamiyoConfig(budget=16_000, budget_macs=0.1, budget_ms=1.0, budget_mb=3.0)
    assert remaining(observed(seeds=(kept,), work=Work(host=10_000)), config) == Room(15_000, 500.0, 0.5, 1.0)
    assert remaining(observed(seeds=(kept,)), config).macs == float("inf")  # the host's work is not known yet


def test_nothing_is_offered_where_it_is_under_embargo() -> None:
    resting = FFN._replace(closed=frozenset({"BP-WIDEN"}))
    assert Menu(LIBRARY).offer(resting, "BP-WIDEN", Room(5_000)) is None
    assert Menu(LIBRARY).offer(resting, "BP-MLP-GELU", Room(5_000)) is not None


def test_a_plateau_is_two_boundaries_without_progress() -> None:
    assert not on_plateau((2.0, 1.9), 0.01)
    assert not on_plateau((2.0, 1.9, 1.8), 0.01)
    assert on_plateau((2.0, 1.999, 1.995), 0.01)


def test_off_never_grows() -> None:
    assert policy("off").propose(observed()).commands == ()  # type: ignore[attr-defined]
