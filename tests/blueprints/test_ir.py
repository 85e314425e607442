"""BlueprintIR: what it accepts, what it refuses and how it says so."""

import json
from copy import deepcopy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.blueprints.hashing import canonical_json
from esper.blueprints.ir import BlueprintIR, parse_ir
from esper.blueprints.library import load_library
from esper.leyline.errors import BlueprintError

MLP = load_library()["BP-MLP-GELU"].ir
PLAIN = json.loads(canonical_json(MLP.model_dump(mode="json")))


def changed(**fields):
    return deepcopy(PLAIN) | fields


def with_nodes(*nodes, output=None):
    return changed(nodes=list(nodes), output=output or nodes[-1]["id"])


def linear(name, source="input", **attrs):
    return {"id": name, "op": "linear", "inputs": [source], "attrs": {"out": "h", **attrs}}


BROKEN = {
    "unknown field 'colour'": (changed(colour="red"), "colour"),
    "bad name": (changed(name="mlp"), "name"),
    "bad version": (changed(version="1.0"), "version"),
    "newer rules": (changed(ir_version=2), "ir_version"),
    "bad placement": (changed(reads="both"), "reads"),
    "placement twice": (changed(also_reads=["output"]), "also_reads repeats reads"),
    "no layout": (changed(layouts=[]), "layouts"),
    "layout twice": (changed(layouts=["bd", "bd"]), "layouts repeats"),
    "layout the op does not know": (changed(layouts=["bchw"]), "'norm': op 'layer_norm' does not know layout 'bchw'"),
    "unknown site kind": (changed(site_kinds=["mpl"]), "unknown site kind 'mpl'"),
    "not affine": (changed(mergeable=True), "'norm': op 'layer_norm' is not affine"),
    "identity from input": (changed(initial="identity"), "must read it"),
    "no nodes": (changed(nodes=[]), "nodes"),
    "too many nodes": (with_nodes(*[linear(f"n{i}") for i in range(65)]), "nodes"),
    "duplicate": (with_nodes(linear("a"), linear("a")), "'a' is defined 2 times"),
    "reserved": (with_nodes(linear("forward")), "'forward': the name is reserved"),
    "input as a node": (with_nodes(linear("input")), "'input': the name is reserved"),
    "unknown op": (with_nodes({"id": "a", "op": "linaer"}), "'a': unknown op 'linaer'; did you mean 'linear'?"),
    "unknown input": (with_nodes(linear("a", "z")), "'a' takes unknown input 'z'"),
    "arity": (with_nodes({"id": "a", "op": "add", "inputs": ["input"]}), "'a': op 'add' takes 2 inputs, not 1"),
    "cycle": (with_nodes(linear("a", "b"), linear("b", "a")), "a, b form a cycle"),
    "self": (with_nodes(linear("a", "a")), "a form a cycle"),
    "idle": (with_nodes(linear("a"), linear("b")), "'a' does not lead to the output 'b'"),
    "no output": (with_nodes(linear("a"), output="b"), "output 'b' is not a node"),
    "missing attribute": (with_nodes({"id": "a", "op": "linear"}), "'a': out"),
    "unknown attribute": (with_nodes(linear("a", rank=2)), "'a': rank"),
    "wrong attribute type": (with_nodes(linear("a", bias="yes")), "'a': bias"),
    "attribute out of range": (with_nodes(linear("a", out=0)), "'a': out"),
    "true is no size": (with_nodes(linear("a", out=True)), "'a': out"),
    "formula over unknown name": (with_nodes(linear("a", out="2*w")), "'a': formula '2*w' uses unknown name 'w'"),
    "malformed formula": (with_nodes(linear("a", out="2*")), "'a': formula '2*'"),
    "not finite": (with_nodes({"id": "a", "op": "layer_norm", "attrs": {"eps": float("inf")}}), "eps"),
    "nothing to train": (with_nodes({"id": "a", "op": "layer_norm"}), "no node has parameters"),
    "size called like a symbol": (changed(dims={"h": {"default": 4}, "d_in": {"default": 4}}), "size 'd_in'"),
    "size called like a function": (changed(dims={"h": {"default": 4}, "max": {"default": 4}}), "size 'max'"),
    "free size from a size": (changed(dims={"h": {"default": "2*g"}, "g": {"default": 4}}), "unknown name 'g'"),
    "size without default": (changed(dims={"h": {}}), "dims.h.default"),
    "too many sizes": (changed(dims={f"h{i}": {"default": 1} for i in range(17)}), "dims"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_named(case):
    data, complaint = BROKEN[case]
    with pytest.raises(BlueprintError) as caught:
        parse_ir(data)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("name", load_library().names())
def test_json_there_and_back_changes_nothing(name):
    ir = load_library()[name].ir
    again = parse_ir(json.loads(canonical_json(ir.model_dump(mode="json"))))
    assert again == ir
    assert again.id == ir.id
    assert hash(again) == hash(ir)
    assert BlueprintIR.model_validate_json(ir.model_dump_json()) == ir


def test_the_id_changes_with_any_field():
    variants = [
        changed(version="1.0.1"),
        changed(reads="input", also_reads=[]),
        changed(layouts=["bd"]),
        changed(dims={"h": {"default": 8}}),
        changed(trainable=False),
    ]
    assert len({parse_ir(data).id for data in [PLAIN, *variants]}) == 6


def test_a_blueprint_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        MLP.name = "BP-OTHER"


def test_reading_elsewhere_changes_the_id_and_can_be_undone():
    assert MLP.id
    moved = MLP.reading("input")
    assert (moved.reads, moved.also_reads, moved.name) == ("input", ("output",), MLP.name)
    assert moved.id != MLP.id
    assert moved.reading("output") == MLP
    assert moved.reading("output").id == MLP.id
    assert MLP.reading("output") is MLP


def test_reading_where_it_may_not_is_refused():
    widen = load_library()["BP-WIDEN"].ir
    with pytest.raises(BlueprintError, match=r"BP-WIDEN@1\.0\.0 cannot read 'output'; it reads 'input'"):
        widen.reading("output")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from([*PLAIN, "extra"])
NODE_JSON = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["a", "b", "input", "type"]),
        "op": st.sampled_from(["linear", "add", "act", "attention", "?"]),
    },
    optional={
        "inputs": st.lists(st.sampled_from(["a", "b", "input", "c"]), max_size=3),
        "attrs": st.dictionaries(st.sampled_from(["out", "bias", "fn", "heads"]), JSON, max_size=3),
    },
)


def _parses_or_refuses(data):
    try:
        ir = parse_ir(data)
    except BlueprintError as error:
        assert str(error)
    else:
        assert parse_ir(json.loads(canonical_json(ir.model_dump(mode="json")))).id == ir.id


@settings(deadline=None)
@given(JSON)
def test_random_json_is_refused_cleanly(data):
    _parses_or_refuses(data)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FIELDS, JSON)
def test_a_random_field_is_refused_cleanly(field, value):
    _parses_or_refuses(changed(**{field: value}))


@settings(deadline=None, max_examples=200)
@given(st.lists(NODE_JSON, max_size=4), st.sampled_from(["a", "b", "input"]))
def test_random_graphs_are_refused_cleanly(nodes, output):
    _parses_or_refuses(changed(nodes=nodes, output=output))
