"""Each arm is the same experiment with one thing changed, and none can read what is reported."""

from typing import Any

import pytest

from esper.bench.arms import ARMS, GROWN, OFF, Plan, with_policy
from esper.bench.rows import Job
from esper.blueprints import cost, load_library
from esper.blueprints.site import SiteShape
from tests.bench.samples import plain_row, plan

STATIC = [name for name, arm in ARMS.items() if not arm.grows]
CHILD = {
    "site": "layers.2", "slot": "c0s0", "blueprint": "BP-PROJ-LORA", "reads": "input", "dims": {"r": 2},
    "shape": SiteShape("bd", 16, 16, 1, "mlp")._asdict(), "start": 0, "width": None, "init_seed": 1,
}  # fmt: skip


def children_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    (planting,) = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("FromStart")]
    found: list[dict[str, Any]] = planting["init_args"]["children"]
    return found


def parameters(children: list[dict[str, Any]]) -> int:
    library = load_library()
    irs = [library[c["blueprint"]].ir.reading(c["reads"]) for c in children]
    return sum(cost(ir, SiteShape(**c["shape"]), c["dims"]).params for ir, c in zip(irs, children, strict=True))


@pytest.mark.parametrize("name", ARMS)
def test_no_arm_touches_the_data_or_what_decides(name: str) -> None:
    given = plan(children=[CHILD])
    made = ARMS[name].make(given)
    assert made["data"] == given.config["data"] and made["model"] == given.config["model"]
    assert made["tamiyo"].get("decision_loader") is None and made["seed_everything"] == 0
    assert not any("test" in key or "val" in key for key in made["trainer"])
    assert (made["tamiyo"]["policy"] == "off") is (not ARMS[name].grows)
    assert not ARMS[name].equal or not ARMS[name].grows, "what grows could not be told beforehand how long to train"


def test_making_an_arm_leaves_the_plan_as_it_was() -> None:
    given, same = plan(children=[CHILD]), plan(children=[CHILD])
    for arm in ARMS.values():
        arm.make(given)
    assert given == same


def test_from_start_plants_what_was_kept_and_without_that_it_is_the_same_run_as_off() -> None:
    assert children_of(ARMS["from_start"].make(plan(children=[CHILD]))) == [CHILD]
    kept_nothing = ARMS["from_start"].make(plan())
    assert Job("from_start", 0, kept_nothing, 9.0).key == Job(OFF, 0, ARMS[OFF].make(plan()), 9.0).key


@pytest.mark.parametrize("name", ["static_wide", "lora"])
def test_children_from_step_0_use_the_budget_and_no_more(name: str) -> None:
    children = children_of(ARMS[name].make(plan()))
    assert 0.85 * 600 < parameters(children) <= 600
    kinds = {"static_wide": ("BP-WIDEN", ["layers.2"]), "lora": ("BP-PROJ-LORA", ["layers.0", "layers.2", "layers.4"])}
    assert ({c["blueprint"] for c in children}, [c["site"] for c in children]) == ({kinds[name][0]}, kinds[name][1])


def test_a_wide_net_that_was_named_is_taken_as_it_is() -> None:
    wide = plan().config | {"model": "wide"}
    made = ARMS["static_wide"].make(Plan(plan().config, wide, found=plain_row()))
    assert made == with_policy(wide, "off")


def test_the_schedule_plants_one_kind_when_the_experiment_begins_to_grow() -> None:
    (entry,) = ARMS["schedule"].make(plan())["tamiyo"]["settings"]["schedule"]
    assert (entry["at"], entry["blueprint"], entry["params"]) == (18, "BP-MLP-GELU", None)
    images = [{**site, "shape": {**site["shape"], "layout": "bchw"}} for site in plain_row()["sites"]]
    (entry,) = ARMS["schedule"].make(plan(sites=images))["tamiyo"]["settings"]["schedule"]
    assert entry["blueprint"] == "BP-CONV-RES"


def test_strict_is_the_preset_and_nothing_of_the_measured_one() -> None:
    kasmina = ARMS["strict"].make(plan())["tamiyo"]["kasmina"]
    assert kasmina == {"preset": "strict", "telemetry_every": 4}
    assert ARMS[GROWN].make(plan())["tamiyo"]["kasmina"]["ramp_steps"] == 5
