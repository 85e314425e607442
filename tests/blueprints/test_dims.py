"""Sizes: defaults, ranges, derived sizes and errors."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.blueprints.dims import DimRange, dim_range, resolve_dims
from esper.blueprints.ir import parse_ir
from esper.blueprints.library import load_library
from esper.blueprints.site import SiteShape
from esper.leyline.errors import BlueprintDoesNotFit, BlueprintError

SITE = SiteShape("bd", 6, 10)


def blueprint(**dims):
    nodes = [{"id": "up", "op": "linear", "attrs": {"out": "d_out"}}]
    return parse_ir({"name": "BP-TRY", "layouts": ["bd"], "dims": dims, "nodes": nodes, "output": "up"})


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        ({"default": 4}, 4),
        ({"default": "2*d_out"}, 20),
        ({"default": "2*d_out", "max": 12}, 12),
        ({"default": "d_out", "multiple_of": 4}, 8),
        ({"default": 1, "min": 3, "multiple_of": 4}, 4),
        ({"default": 99, "max": "d_out+1", "multiple_of": 3}, 9),
    ],
)
def test_a_default_is_moved_into_its_range(spec, value):
    assert resolve_dims(blueprint(h=spec), SITE, None) == {"h": value}


def test_a_derived_size_follows_the_free_ones():
    ir = blueprint(g={"default": "2*h + d_out", "free": False}, h={"default": 4})
    assert resolve_dims(ir, SITE, {"h": 3}) == {"h": 3, "g": 16}


def test_a_derived_size_out_of_range_does_not_fit():
    ir = blueprint(g={"default": "h-4", "free": False}, h={"default": 4})
    with pytest.raises(BlueprintDoesNotFit, match="'g' is 0; allowed here: 1 to"):
        resolve_dims(ir, SITE, None)


@pytest.mark.parametrize(
    ("given_dims", "complaint"),
    [
        ({"w": 3}, "no free size 'w'; free sizes: h"),
        ({"g": 3}, "no free size 'g'"),
        ({"h": 2.0}, "must be an integer, not 2.0"),
        ({"h": True}, "must be an integer, not True"),
        ({"h": 0}, "'h' is 0; allowed here: 2 to 8 in steps of 2"),
        ({"h": 3}, "'h' is 3"),
        ({"h": 10}, "'h' is 10"),
    ],
)
def test_a_wrong_choice_says_what_is_allowed(given_dims, complaint):
    ir = blueprint(g={"default": "h", "free": False}, h={"default": 4, "max": 8, "multiple_of": 2})
    with pytest.raises(BlueprintError, match=complaint):
        resolve_dims(ir, SITE, given_dims)


def test_a_range_without_values_does_not_fit():
    ir = blueprint(h={"default": 4, "min": 5, "max": "d_out//3"})
    with pytest.raises(BlueprintDoesNotFit, match="at least 5 but may be at most 3"):
        dim_range(ir, SITE, "h")


def test_the_rank_never_exceeds_the_host():
    lora = load_library()["BP-PROJ-LORA"].ir
    assert resolve_dims(lora, SiteShape("bd", 64, 3), None) == {"r": 3}
    assert resolve_dims(lora.reading("output"), SiteShape("bd", 2, 30), None) == {"r": 8}


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 40), st.integers(-5, 200))
def test_snapping_stays_in_range_and_on_the_grid(step, low_steps, more_steps, value):
    span = DimRange(low_steps * step, (low_steps + more_steps) * step, step)
    snapped = span.snap(value)
    assert span.low <= snapped <= span.high
    assert snapped % step == 0
    assert snapped <= max(value, span.low)
