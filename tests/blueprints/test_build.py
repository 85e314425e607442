"""The interpreter: weights from the seed alone, plain modules, right numbers."""

import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from torch import nn

from esper.blueprints.build import build
from esper.blueprints.ir import parse_ir
from esper.blueprints.library import STANDARD
from esper.blueprints.site import SiteShape
from esper.leyline.errors import BlueprintDoesNotFit, BlueprintError
from tests.blueprints.growing import HERE, LIBRARY, features, grown, site_of

TOKENS = SiteShape("btd", 8, 8, 6)
SOAK = int(os.environ.get("ESPER_SOAK", "0"))
COMPILED = (
    *STANDARD,
    "BP-ATTN-LINEAR",
    "BP-ATTN-LOCAL",
    "BP-CLAMP-GRAD-NORM",
    "BP-KV-CACHE-8BIT",
    "BP-LOAD-BAL-EMA",
    "BP-MON-ACT-STATS",
    "BP-RNN-MINGRU",
    "BP-ROUTER-MOE-AUXLOSS",
)
"""Blueprints with operations that a compiler might trip over."""


def same(one, two):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("name", HERE)
def test_weights_depend_on_the_seed_alone(name):
    ir = LIBRARY[name].ir
    torch.manual_seed(1)
    first = build(ir, site_of(ir), seed=3)
    torch.manual_seed(2)
    with ThreadPoolExecutor(1) as thread:
        second = thread.submit(build, ir, site_of(ir), seed=3).result()
    assert same(first, second)
    assert torch.initial_seed() == 2
    random = any(parameter.unique().numel() > 1 for parameter in first.parameters())
    assert same(first, build(ir, site_of(ir), seed=4)) != random


@pytest.mark.parametrize("name", HERE)
def test_a_child_survives_pickle_and_deep_copy(name):
    child, x = grown(name), features(LIBRARY[name].ir)
    assert torch.equal(pickle.loads(pickle.dumps(child))(x), deepcopy(child)(x))
    assert torch.equal(deepcopy(child)(x), child(x))


@pytest.mark.parametrize("name", HERE)
def test_batches_and_texts_of_any_length(name):
    child, width = grown(name), features(LIBRARY[name].ir).shape[1:]
    texts = ((6, 8), (1, 8), (70, 8)) if LIBRARY[name].ir.layouts[0] == "btd" else (width,)
    for batch in (0, 1, 5):
        for shape in texts:
            x = torch.randn(batch, *shape, requires_grad=True)
            result = child(x)
            assert result.shape == x.shape
            (result + x).square().sum().backward()
            assert all(t.isfinite().all() for t in (result, x.grad, *child.buffers()))


@pytest.mark.parametrize("name", HERE if SOAK else COMPILED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_compiles_to_one_graph(name):
    child, x = grown(name), features(LIBRARY[name].ir)
    torch._dynamo.reset()
    compiled = torch.compile(child, backend="eager", fullgraph=True)
    expected = deepcopy(child)(x)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_child_exports():
    ir = LIBRARY["BP-ATTN-STD"].ir
    child, x = build(ir, TOKENS, seed=0), features(ir)
    assert torch.equal(torch.export.export(child, (x,)).module()(x), child(x))


def test_weights_start_as_torch_starts_them():
    child = build(LIBRARY["BP-MLP-GELU"].ir, SiteShape("bd", 64, 64), {"h": 512}, seed=0)
    bound = 1 / math.sqrt(64)
    for parameter in (child.up.weight, child.up.bias):
        assert parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not child.down.weight.any()
    assert not child.down.bias.any()


def test_state_is_named_after_the_nodes():
    child = build(LIBRARY["BP-CONV-CAUSAL"].ir, TOKENS, seed=0)
    layers = ("mix.conv", "up", "down")
    assert list(child.state_dict()) == [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]


def test_precision_is_chosen_and_only_rounds_the_weights():
    ir = LIBRARY["BP-MLP-SWIGLU"].ir
    low = build(ir, TOKENS, seed=0, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    assert same(low, build(ir, TOKENS, seed=0).to(torch.bfloat16))
    assert low(torch.randn(2, 6, 8).bfloat16()).dtype == torch.bfloat16


def test_autocast_returns_the_precision_that_came_in():
    child = build(LIBRARY["BP-PROJ-LORA"].ir, TOKENS, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert child(torch.randn(2, 6, 8)).dtype == torch.float32


def test_the_expert_is_a_gated_mlp():
    child = build(LIBRARY["BP-EXPERT-MLP"].ir, TOKENS, seed=0)
    nn.init.normal_(child.down.weight)
    x = torch.randn(2, 6, 8)
    normed = nn.functional.layer_norm(x, (8,))
    gate = torch.sigmoid(child.router(normed))
    torch.testing.assert_close(child(x), gate * child.down(nn.functional.gelu(child.up(normed))))


def test_attention_agrees_with_torch():
    child = build(LIBRARY["BP-ATTN-STD"].ir, TOKENS, {"a": 8}, seed=0)
    nn.init.normal_(child.proj.weight)
    reference = nn.MultiheadAttention(8, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(child.qkv.weight)
        reference.in_proj_bias.copy_(child.qkv.bias)
        reference.out_proj.load_state_dict(child.proj.state_dict())
    x = torch.randn(2, 6, 8)
    normed = nn.functional.layer_norm(x, (8,))
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    torch.testing.assert_close(child(x), reference(normed, normed, normed, attn_mask=mask, need_weights=False)[0])


def test_the_causal_convolution_is_a_sum_over_the_past():
    ir = parse_ir(
        {
            "name": "BP-TRY",
            "layouts": ["btd"],
            "nodes": [{"id": "mix", "op": "causal_conv", "attrs": {"out": "d_out", "kernel": 3, "bias": False}}],
            "output": "mix",
        }
    )
    child, x = build(ir, TOKENS, seed=0), torch.randn(2, 6, 8)
    past = nn.functional.pad(x, (0, 0, 2, 0))
    wanted = sum(past[:, shift : shift + 6] @ child.mix.conv.weight[:, :, shift].T for shift in range(3))
    torch.testing.assert_close(child(x), wanted)


@pytest.mark.parametrize("shape", [(3, 8), (2, 6, 8), (2, 8, 4, 5)])
def test_the_gain_acts_on_features_in_every_layout(shape):
    layout = {2: "bd", 3: "btd", 4: "bchw"}[len(shape)]
    child = build(LIBRARY["BP-NORM-RMS"].ir, SiteShape(layout, 8, 8, 20), seed=0)
    x, axis = torch.randn(shape), 1 if layout == "bchw" else -1
    with torch.no_grad():
        child.gain.weight.copy_(torch.arange(8.0))
    gain = torch.arange(8.0).view(-1, *(1,) * (2 if layout == "bchw" else 0))
    torch.testing.assert_close(child(x), gain * x / x.square().mean(axis, keepdim=True).sqrt(), rtol=1e-4, atol=1e-4)


def test_a_fixed_function_has_no_gradient():
    fixed = parse_ir(LIBRARY["BP-MLP-GELU"].ir.model_dump() | {"trainable": False})
    assert not any(parameter.requires_grad for parameter in build(fixed, TOKENS, seed=0).parameters())


def test_a_monster_is_refused_before_memory_is_taken():
    with pytest.raises(BlueprintDoesNotFit, match="at most 2147483648 are allowed"):
        build(LIBRARY["BP-MLP-GELU"].ir, SiteShape("bd", 8, 1 << 20), {"h": 1 << 16}, seed=0)


def test_an_unknown_size_is_named():
    with pytest.raises(BlueprintError, match="no free size 'rank'; free sizes: r"):
        build(LIBRARY["BP-PROJ-LORA"].ir, TOKENS, {"rank": 4}, seed=0)


def test_a_child_says_what_it_is():
    assert "BP-MLP-GELU@1.0.0, reads=output, dims={'h': 4}" in repr(
        build(LIBRARY["BP-MLP-GELU"].ir, TOKENS, {"h": 4}, seed=0)
    )
