"""Costs and budgets."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.blueprints.build import build
from esper.blueprints.cost import Cost, cost, fit_dims, why_not
from esper.blueprints.dims import dim_range
from esper.blueprints.ir import parse_ir
from esper.blueprints.site import SITE_KINDS, SiteShape
from esper.leyline.errors import BlueprintDoesNotFit
from tests.blueprints.growing import HERE, LIBRARY

SITES = st.builds(
    SiteShape,
    st.sampled_from(["btd", "bd", "bchw"]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 50),
    st.sampled_from(SITE_KINDS),
)


def dims_of(ir, site, dims, name, steps):
    return dims | {name: dims[name] + steps * dim_range(ir, site, name).step}


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(HERE), st.booleans(), SITES, st.integers(0, 20_000))
def test_fitted_sizes_fit_and_the_next_would_not(name, other, site, budget):
    ir = LIBRARY[name].ir
    ir = ir.reading(ir.also_reads[0]) if other and ir.also_reads else ir
    if why_not(ir, site):
        with pytest.raises(BlueprintDoesNotFit):
            fit_dims(ir, site, budget)
        return
    try:
        dims = fit_dims(ir, site, budget)
    except BlueprintDoesNotFit as error:
        least = {size: dim_range(ir, site, size).low for size, spec in ir.dims.items() if spec.free}
        assert f"at least {cost(ir, site, least).params} parameters here; the budget is {budget}" in str(error)
        assert cost(ir, site, least).params > budget
        return
    assert cost(ir, site, dims).params <= budget
    for size, value in dims.items():
        if value < dim_range(ir, site, size).high:
            assert cost(ir, site, dims_of(ir, site, dims, size, 1)).params > budget


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(HERE), SITES)
def test_the_parameters_claimed_are_those_built(name, site):
    ir = LIBRARY[name].ir
    if why_not(ir, site) is None:
        built = sum(parameter.numel() for parameter in build(ir, site, seed=0).parameters())
        assert cost(ir, site).params == built


def test_several_free_sizes_share_the_budget():
    nodes = [
        {"id": "a", "op": "linear", "attrs": {"out": "g"}},
        {"id": "b", "op": "linear", "inputs": ["a"], "attrs": {"out": "h"}},
        {"id": "c", "op": "linear", "inputs": ["b"], "attrs": {"out": "d_out"}},
    ]
    sizes = {"g": {"default": 8, "max": 6}, "h": {"default": 8, "multiple_of": 2}}
    ir = parse_ir({"name": "BP-TRY", "layouts": ["bd"], "dims": sizes, "nodes": nodes, "output": "c"})
    site = SiteShape("bd", 8, 8)
    dims = fit_dims(ir, site, 600)
    assert dims["g"] == 6
    assert cost(ir, site, dims).params <= 600 < cost(ir, site, dims | {"h": dims["h"] + 2}).params


@pytest.mark.parametrize(
    ("name", "dims", "wanted"),
    [
        ("BP-MLP-GELU", {"h": 128}, Cost(16_576, 2_097_152)),
        ("BP-MLP-SWIGLU", {"h": 86}, Cost(16_748, 2_113_536)),
        ("BP-CONV-CAUSAL", {"h": 126}, Cost(16_638, 2_097_152)),
        ("BP-ATTN-STD", {"a": 64}, Cost(16_640, 4_194_304)),
        ("BP-PROJ-LORA", {"r": 8}, Cost(1_024, 131_072)),
        ("BP-PROJ-IA3", {}, Cost(64, 0)),
        ("BP-EXPERT-MLP", {"h": 16}, Cost(2_193, 270_336)),
    ],
)
def test_known_costs(name, dims, wanted):
    assert cost(LIBRARY[name].ir, SiteShape("btd", 64, 64, 128), dims) == wanted
