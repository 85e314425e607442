"""Shape inference: the order of steps and the reasons for which a blueprint does not fit."""

import pytest

from esper.blueprints.ir import parse_ir
from esper.blueprints.library import load_library
from esper.blueprints.plan import make_plan, why_not
from esper.blueprints.site import SiteShape
from esper.leyline.errors import BlueprintDoesNotFit

LIBRARY = load_library()
MLP = LIBRARY["BP-MLP-GELU"].ir


def blueprint(*nodes, layouts=("btd", "bd"), **fields):
    data = {"name": "BP-TRY", "layouts": layouts, "nodes": nodes, "output": nodes[-1]["id"]}
    return parse_ir(data | fields)


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("BP-MLP-GELU", SiteShape("bchw", 8, 8, 4), "serves layouts btd, bd; this site is bchw"),
        ("BP-ATTN-STD", SiteShape("bd", 8, 8), "serves layouts btd; this site is bd"),
        ("BP-CONV-RES", SiteShape("btd", 8, 8, 4), "serves layouts bchw"),
        ("BP-WIDEN", SiteShape("bd", 8, 8, 1, "norm"), "this one is norm"),
        ("BP-MLP-GELU", SiteShape("bd", 8, 1), "'norm': layer norm of a single feature"),
        ("BP-CONV-RES", SiteShape("bchw", 1, 1, 1), "'norm': 1 groups cannot normalise 1 channels of 1 pixels"),
        ("BP-MLP-GELU", SiteShape("bd", 8, 0), "must be positive"),
        ("BP-MLP-GELU", SiteShape("bd", 8, 1 << 21), "wider than"),
    ],
)
def test_a_misfit_says_why(name, site, reason):
    assert reason in why_not(LIBRARY[name].ir, site)
    with pytest.raises(BlueprintDoesNotFit):
        make_plan(LIBRARY[name].ir, site)


@pytest.mark.parametrize("name", ["BP-PROJ-LORA", "BP-PROJ-IA3", "BP-WIDEN", "BP-NORM-RMS"])
def test_a_chunk_of_one_neuron_can_be_served(name):
    assert why_not(LIBRARY[name].ir, SiteShape("bd", 8, 1, 1, "linear")) is None


def test_a_fit_has_no_reason():
    assert why_not(MLP, SiteShape("bd", 3, 8)) is None


def test_what_is_read_sets_the_input_width():
    site = SiteShape("bd", 3, 8)
    assert make_plan(MLP, site).steps[0].inputs[0].width == 8
    assert make_plan(MLP.reading("input"), site).steps[0].inputs[0].width == 3


def test_nodes_may_stand_in_any_order():
    backwards = MLP.model_copy(update={"nodes": MLP.nodes[::-1]})
    site = SiteShape("bd", 8, 8)
    assert [step.id for step in make_plan(backwards, site).steps] == ["norm", "up", "gelu", "down"]


def test_a_result_of_the_wrong_width_does_not_fit():
    ir = blueprint({"id": "up", "op": "linear", "attrs": {"out": 5}})
    assert why_not(ir, SiteShape("bd", 5, 5)) is None
    assert "returns 5 features from 'up'; the site writes 6" in why_not(ir, SiteShape("bd", 5, 6))


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (
            [
                {"id": "a", "op": "linear", "attrs": {"out": 3}},
                {"id": "b", "op": "linear", "attrs": {"out": "d_out"}},
                {"id": "c", "op": "mul", "inputs": ["a", "b"]},
            ],
            "'c': its inputs are [3, 8] features wide",
        ),
        (
            [{"id": "a", "op": "linear", "attrs": {"out": "d-9"}}],
            "'a': out: Input should be greater than or equal to 1",
        ),
        (
            [{"id": "a", "op": "linear", "attrs": {"out": "8//(d-8)"}}],
            "'a': formula '8//(d-8)' divides by zero",
        ),
        (
            [
                {"id": "a", "op": "linear", "attrs": {"out": 30}},
                {"id": "b", "op": "attention", "inputs": ["a"], "attrs": {"heads": 4}},
                {"id": "c", "op": "linear", "inputs": ["b"], "attrs": {"out": "d_out"}},
            ],
            "'b': its input is 30 wide; 4 heads need a multiple of 12",
        ),
        (
            [{"id": "a", "op": "causal_conv", "attrs": {"out": "d_out", "groups": 3}}],
            "'a': 3 groups must divide both the 8 features in and the 8 out",
        ),
    ],
)
def test_shapes_that_clash_name_the_node(nodes, reason):
    assert reason in why_not(blueprint(*nodes, layouts=("btd",)), SiteShape("btd", 8, 8, 4))
