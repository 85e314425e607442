"""The shipped checker passes the whole library and catches every kind of broken promise."""

import sys
from dataclasses import replace

import pytest
import torch

from esper.blueprints import build, checks, ops_monitor
from esper.blueprints.cost import Cost
from esper.blueprints.ir import parse_ir
from esper.blueprints.routing import Router
from esper.blueprints.site import SiteShape
from esper.testing import check_blueprint
from tests.blueprints.growing import LIBRARY, capable, one_rank

GELU = LIBRARY["BP-MLP-GELU"]


@pytest.mark.parametrize("name", LIBRARY.names())
def test_every_blueprint_keeps_its_contract(name):
    check_blueprint(LIBRARY[name])


def test_what_needs_a_device_keeps_it_where_there_is_one(monkeypatch):
    """The processor has a fused attention of its own, and one process can be a group."""
    with capable(monkeypatch, "flash_attention"):
        check_blueprint(LIBRARY["BP-FLASH-ATTN-V2"])
    with one_rank():
        check_blueprint(LIBRARY["BP-ALL-REDUCE-SHARD"])


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("BP-ATTN-LOCAL", SiteShape("btd", 16, 16, 70)),
        ("BP-ATTN-LINEAR", SiteShape("btd", 8, 16, 35)),
        ("BP-ROUTER-TOP2", SiteShape("btd", 7, 9, 13)),
        ("BP-SSM-DIAG", SiteShape("btd", 3, 5, 1)),
        ("BP-CONV-LARGE", SiteShape("bchw", 3, 5, 7)),
        ("BP-CONV-NEXT", SiteShape("bchw", 1, 3, 1)),
        ("BP-WIDEN-CONV", SiteShape("bchw", 3, 10, 12, "conv2d")),
        ("BP-RNN-GATED", SiteShape("bd", 4, 11)),
        ("BP-CANON", SiteShape("btd", 24, 72, 5, "linear")),
    ],
)
def test_odd_places_too(name, site):
    check_blueprint(LIBRARY[name], site)


def test_a_need_that_is_not_refused_is_caught(monkeypatch):
    monkeypatch.setattr(sys.modules[build.__module__], "require_capabilities", lambda ir: None)
    monkeypatch.setattr(checks, "lacking", lambda ir: ["flash_attention"])
    with pytest.raises(AssertionError, match="is built although flash_attention is not offered here"):
        check_blueprint(LIBRARY["BP-FLASH-ATTN-V2"])


@pytest.mark.parametrize("site", [SiteShape("btd", 24, 24, 16), SiteShape("bd", 3, 16, 1, "linear")])
def test_a_blueprint_keeps_it_at_a_chosen_site(site):
    check_blueprint(GELU, site)


def test_a_site_that_does_not_fit_is_reported():
    with pytest.raises(AssertionError, match=r"BP-MLP-GELU@1\.0\.0 does not fit: .*this site is bchw"):
        check_blueprint(GELU, SiteShape("bchw", 8, 8, 4))


def test_a_blueprint_that_fits_nowhere_is_reported():
    odd = rewired(GELU, nodes=[{"id": "up", "op": "linear", "attrs": {"out": 7}}], output="up")
    with pytest.raises(AssertionError, match="does not fit"):
        check_blueprint(odd)


def rewired(blueprint, **fields):
    manifest = blueprint.manifest.model_copy(update={"mergeable": fields.get("mergeable", False)})
    return replace(blueprint, ir=parse_ir(blueprint.ir.model_dump() | fields), manifest=manifest)


def attention(causal):
    nodes = [node.model_dump() for node in LIBRARY["BP-ATTN-STD"].ir.nodes]
    nodes[2]["attrs"]["causal"] = causal
    return rewired(LIBRARY["BP-ATTN-STD"], nodes=nodes)


def test_a_leak_of_the_future_is_caught():
    check_blueprint(attention(True))
    with pytest.raises(AssertionError, match="causality: changing tokens from 1 on changes earlier results"):
        check_blueprint(attention(False))


def linear_node(**attrs):
    return [{"id": "up", "op": "linear", "attrs": {"out": "d_out", **attrs}}]


def test_an_effect_at_birth_is_caught():
    with pytest.raises(AssertionError, match="birth: at birth it changes the host's output"):
        check_blueprint(rewired(GELU, nodes=linear_node(), output="up"))


def test_a_start_without_gradient_is_caught():
    dead = linear_node(init="zero") + [
        {"id": "down", "op": "linear", "inputs": ["up"], "attrs": {"out": "d_out", "init": "zero", "bias": False}}
    ]
    dead[0]["attrs"]["bias"] = False
    with pytest.raises(AssertionError, match="gradient: trainable is True"):
        check_blueprint(rewired(GELU, nodes=dead, output="down"))


def test_a_parameter_that_never_learns_is_caught():
    stuck = [
        *linear_node(init="zero"),
        {"id": "gain", "op": "gain", "attrs": {"init": "zero"}},
        {"id": "sign", "op": "choose", "inputs": ["gain"], "attrs": {"k": 1}},
        {"id": "done", "op": "mul", "inputs": ["up", "sign"]},
    ]
    with pytest.raises(AssertionError, match=r"learning: no gradient reaches gain\.weight in 30 steps"):
        check_blueprint(rewired(GELU, nodes=stuck, output="done"), SiteShape("bd", 8, 8))


def test_a_state_that_counts_a_pass_twice_is_caught(monkeypatch):
    monkeypatch.setattr(Router, "observes", lambda self: self.training)
    with pytest.raises(AssertionError, match="a pass that runs again for its gradients"):
        check_blueprint(LIBRARY["BP-LOAD-BAL-EMA"])


def test_a_state_that_moves_in_evaluation_is_caught(monkeypatch):
    monkeypatch.setattr(ops_monitor.Meter, "observes", lambda self: torch._C._current_graph_task_id() == -1)
    with pytest.raises(AssertionError, match="evaluation changes the state"):
        check_blueprint(LIBRARY["BP-MON-ACT-STATS"])


@pytest.mark.parametrize(("claim", "complaint"), [(Cost(1, 0), "claims 1"), (None, "claims -1")])
def test_a_wrong_claim_of_cost_is_caught(monkeypatch, claim, complaint):
    true_cost = checks.cost
    monkeypatch.setattr(checks, "cost", lambda ir, site: claim or true_cost(ir, site)._replace(macs=-1))
    with pytest.raises(AssertionError, match=complaint):
        check_blueprint(GELU)


def test_a_fixed_function_passes():
    check_blueprint(rewired(GELU, trainable=False))


def test_an_affine_blueprint_of_ones_own_passes():
    check_blueprint(rewired(GELU, mergeable=True, nodes=linear_node(init="zero"), output="up"))
