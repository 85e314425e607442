"""The shipped checker passes the whole library and catches every kind of broken promise."""

from dataclasses import replace

import pytest

from esper.blueprints import checks
from esper.blueprints.cost import Cost
from esper.blueprints.ir import parse_ir
from esper.blueprints.library import load_library
from esper.blueprints.site import SiteShape
from esper.testing import check_blueprint

LIBRARY = load_library()
GELU = LIBRARY["BP-MLP-GELU"]


@pytest.mark.parametrize("name", LIBRARY.names())
def test_every_blueprint_keeps_its_contract(name):
    check_blueprint(LIBRARY[name])


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
