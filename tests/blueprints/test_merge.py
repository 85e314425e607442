"""Folding children into a linear host."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper.blueprints.build import build
from esper.blueprints.ir import parse_ir
from esper.blueprints.library import load_library
from esper.blueprints.merge import merged_linear
from esper.blueprints.site import SiteShape
from esper.leyline.errors import BlueprintDoesNotFit, BlueprintError

LIBRARY = load_library()
LORA, IA3 = LIBRARY["BP-PROJ-LORA"].ir, LIBRARY["BP-PROJ-IA3"].ir
AFFINE = parse_ir(
    {
        "name": "BP-TRY",
        "mergeable": True,
        "layouts": ["bd", "btd"],
        "nodes": [
            {"id": "a", "op": "linear", "attrs": {"out": "d_out"}},
            {"id": "b", "op": "gain", "inputs": ["a"]},
            {"id": "c", "op": "add", "inputs": ["a", "b"]},
        ],
        "output": "c",
    }
)


def trained(ir, site, seed):
    child = build(ir, site, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in child.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
    return child


def grafted(child, x, y, alpha):
    result = child(x if child.ir.reads == "input" else y)
    return y + alpha * (result - y if child.ir.initial == "identity" else result)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([LORA, LORA.reading("output"), IA3, AFFINE]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.booleans(),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_the_merged_layer_equals_the_live_graft(ir, d_in, d_out, bias, alpha, seed):
    host = nn.Linear(d_in, d_out, bias)
    child = trained(ir, SiteShape("btd", d_in, d_out, 5, "linear"), seed)
    weight, offset = merged_linear(child, host.weight, host.bias, alpha)
    x = torch.randn(3, 5, d_in, dtype=torch.float64)
    live = grafted(child.double(), x, host.double()(x), alpha)
    merged = nn.functional.linear(x, weight.double(), None if offset is None else offset.double())
    assert ((merged - live).norm() / live.norm()).item() <= 1e-6


def test_a_chunk_folds_into_its_rows():
    host, x = nn.Linear(6, 9), torch.randn(4, 6)
    child = trained(IA3, SiteShape("bd", 6, 3), 0)
    y = host(x)
    wanted = y.clone()
    wanted[:, 3:6] = grafted(child, x, y[:, 3:6], 0.5)
    with torch.no_grad():
        host.weight[3:6], host.bias[3:6] = merged_linear(child, host.weight[3:6], host.bias[3:6], torch.tensor(0.5))
    torch.testing.assert_close(host(x), wanted)


def test_nothing_is_written_in_place_and_precision_is_kept():
    weight = torch.randn(3, 6, dtype=torch.bfloat16)
    before = weight.clone()
    merged, bias = merged_linear(trained(LORA, SiteShape("bd", 6, 3), 0), weight, None, 1.0)
    assert torch.equal(weight, before)
    assert merged.dtype == torch.bfloat16
    assert bias is None
    assert not merged.requires_grad


def test_a_child_with_a_bias_gives_one_to_a_host_without():
    _, bias = merged_linear(trained(AFFINE, SiteShape("bd", 4, 4), 0), torch.eye(4), None, 1.0)
    assert bias is not None


def test_what_is_not_mergeable_is_refused():
    child = build(LIBRARY["BP-MLP-GELU"].ir, SiteShape("bd", 4, 4), seed=0)
    with pytest.raises(BlueprintError, match=r"BP-MLP-GELU@1\.0\.0 is not mergeable"):
        merged_linear(child, torch.eye(4), None, 1.0)


@pytest.mark.parametrize(("site", "shape"), [(SiteShape("bd", 4, 4), (4, 5)), (SiteShape("bchw", 4, 4, 4), (4, 4))])
def test_a_weight_of_another_shape_is_refused(site, shape):
    with pytest.raises(BlueprintDoesNotFit, match="does not merge into a weight"):
        merged_linear(build(IA3, site, seed=0), torch.zeros(shape), None, 1.0)
