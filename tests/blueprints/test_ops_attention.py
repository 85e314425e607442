"""Attention from separate queries, keys and values, against formulas written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from esper.blueprints import SiteShape, build, cost, load_library, parse_ir, why_not
from esper.blueprints.ops_attention import GroupedAttention
from tests.blueprints.growing import capable, grown, one_op, part, stirred

LIBRARY = load_library()


def attended(q, k, v, seen):
    """Attention of one head of (T, C) tensors, weight by weight."""
    scores = (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v


def by_head(x, heads):
    return x.unflatten(-1, (heads, -1)).unbind(-2)


@pytest.mark.parametrize(("heads", "kv_heads", "causal"), [(4, 4, True), (4, 2, True), (4, 1, False)])
def test_queries_share_keys_and_values(heads, kv_heads, causal):
    q, k, v = torch.randn(3, 7, 8), torch.randn(3, 7, 8 * kv_heads // heads), torch.randn(3, 7, 3 * kv_heads)
    seen = torch.ones(7, 7, dtype=torch.bool).tril() if causal else torch.ones(7, 7, dtype=torch.bool)
    found = GroupedAttention(heads, kv_heads, causal)(q, k, v)
    for sample in range(3):
        for head, one in enumerate(by_head(q[sample], heads)):
            shared = head * kv_heads // heads
            wanted = attended(one, by_head(k[sample], kv_heads)[shared], by_head(v[sample], kv_heads)[shared], seen)
            torch.testing.assert_close(by_head(found[sample], heads)[head], wanted)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 13])
def test_a_window_is_attention_with_a_band(tokens):
    window, x = part("local_attention", inputs=3, window=4), torch.randn(2, tokens, 8)
    places = torch.arange(tokens)
    seen = (places[:, None] >= places) & (places[:, None] - places < 4)
    wanted = [torch.cat([attended(h, h, h, seen) for h in by_head(sample, 4)], -1) for sample in x]
    torch.testing.assert_close(window(x, x, x), torch.stack(wanted))


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16])
def test_linear_attention_is_a_weighted_mean_of_the_past(tokens):
    q, k, v = torch.randn(3, 2, tokens, 8)
    found = part("linear_attention", inputs=3, block=3)(q, k, v)
    for head in range(4):
        one, other, value = (by_head(x, 4)[head] for x in (F.elu(q) + 1, F.elu(k) + 1, v))
        weights = (one @ other.transpose(-1, -2)).tril()
        wanted = weights @ value / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(by_head(found, 4)[head], wanted, rtol=1e-4, atol=1e-5)


def test_blocks_of_linear_attention_change_nothing():
    q, k, v = torch.randn(3, 2, 11, 8)
    results = [part("linear_attention", inputs=3, block=block)(q, k, v) for block in (1, 4, 16)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


def test_rope_keeps_lengths_and_makes_scores_depend_on_distance():
    rope, x = part("rope", width=16), torch.randn(2, 9, 16)
    turned = rope(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    same = torch.randn(1, 1, 16).expand(1, 9, 16)
    q = by_head(rope(same), 4)[1][0]
    scores = q @ q.T
    for distance in range(1, 9):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-4)
    assert (scores.diagonal(3) - scores.diagonal(0)[3:]).abs().max() > 1e-3


def test_rope_is_a_rotation_of_pairs():
    x = torch.randn(1, 5, 8)
    turned = part("rope", heads=2)(x)
    for start in (0, 4):
        for pair, rate in enumerate((1.0, 10_000 ** (-1 / 2))):
            z = torch.complex(x[0, :, start + pair], x[0, :, start + pair + 2])
            wanted = z * torch.polar(torch.ones(5), rate * torch.arange(5.0))
            torch.testing.assert_close(turned[0, :, start + pair], wanted.real)
            torch.testing.assert_close(turned[0, :, start + pair + 2], wanted.imag)


def test_heads_are_normalised_apart():
    x = torch.randn(2, 6, 8) * 5
    found = part("head_norm")(x).unflatten(-1, (4, 2))
    torch.testing.assert_close(found.square().mean(-1), torch.ones(2, 6, 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 6, 8), (3, 8)])
def test_eight_bits_hold_255_steps_and_pass_the_gradient(shape):
    layout = {3: "btd", 2: "bd"}[len(shape)]
    x = (torch.randn(shape) * 3).requires_grad_()
    kept = part("fake_quant", layout=layout, heads=2)(x)
    for found, given in zip(by_head(kept, 2), by_head(x, 2), strict=True):
        step = given.detach().abs().amax(-1, keepdim=True) / 127
        torch.testing.assert_close((found / step).round() * step, found, rtol=1e-5, atol=1e-6)
        assert ((found - given).abs() <= step / 2 + 1e-6).all()
    gradient = torch.randn(shape)
    (found,) = torch.autograd.grad(kept, x, gradient)
    assert torch.equal(found, gradient)
    assert not part("fake_quant", layout=layout)(torch.zeros(shape)).any()


def test_the_fused_kernel_computes_attention(monkeypatch):
    """The processor has one too, so that what a GPU needs can be tried without."""
    site = SiteShape("btd", 32, 32, 6)
    with capable(monkeypatch, "flash_attention"):
        child = stirred(build(LIBRARY["BP-FLASH-ATTN-V2"].ir, site, seed=0))
    plain = part("attend", width=32, inputs=3, causal=True)
    x = torch.randn(2, 6, 32)
    normed = F.layer_norm(x, (32,))
    q, k, v = child.q(normed), child.k(normed), child.v(normed)
    torch.testing.assert_close(child.mixed(q, k, v), plain(q, k, v), rtol=3e-2, atol=3e-2)
    assert child(x).dtype == torch.float32
    child(x).sum().backward()
    assert all(p.grad is not None for p in child.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_fused_kernel_agrees_with_the_eager_formula():
    ir = LIBRARY["BP-FLASH-ATTN-V2"].ir
    if why_not(ir, SiteShape("btd", 64, 64, 128)):
        pytest.skip("the device is too old")
    child = stirred(build(ir, SiteShape("btd", 64, 64, 128), seed=0, device="cuda"))
    x = torch.randn(4, 128, 64, device="cuda", requires_grad=True)
    normed = F.layer_norm(x, (64,))
    q, k, v = child.q(normed), child.k(normed), child.v(normed)
    plain = part("attend", width=64, inputs=3, causal=True)
    torch.testing.assert_close(child.mixed(q, k, v), plain(q, k, v), rtol=3e-2, atol=3e-2)
    child(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_split_attention_has_bounded_scores():
    child, x = grown("BP-ATTN-SPLIT-QK"), torch.randn(2, 6, 8) * 1000
    assert child.dims == {"a": 8, "s": 8}
    torch.testing.assert_close(child(x), child(x / 1000), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("op", "inputs", "width", "attrs", "complaint"),
    [
        ("head_norm", 1, 6, {}, "4 heads must divide the 6 features evenly"),
        ("rope", 1, 12, {}, "have no pairs to turn"),
        ("attend", 3, 8, {"kv_heads": 3}, "cannot share 3 of keys evenly"),
        ("attend", 3, 8, {"kv_heads": 2}, "its queries have 2 features in a head and its keys 4"),
        ("flash_attention", 3, 8, {}, "equal heads of a multiple of 8 features"),
    ],
)
def test_widths_that_do_not_fit(op, inputs, width, attrs, complaint, monkeypatch):
    with capable(monkeypatch, "flash_attention"):
        assert complaint in why_not(one_op(op, inputs=inputs, **attrs), SiteShape("btd", width, width, 6))


def test_queries_and_keys_of_different_heads_are_told():
    nodes = [
        {"id": "q", "op": "linear", "attrs": {"out": 16}},
        {"id": "it", "op": "linear_attention", "inputs": ["q", "input", "input"]},
    ]
    ir = parse_ir({"name": "BP-TRY", "layouts": ["btd"], "nodes": nodes, "output": "it"})
    assert "4 features in a head and its keys 2" in why_not(ir, SiteShape("btd", 8, 8, 6))


def test_known_costs():
    site = SiteShape("btd", 64, 64, 128)
    for name, macs in (
        ("BP-ATTN-LOCAL", 4 * 128 * 64 * 64 + 128 * 2 * 32 * 128),
        ("BP-KV-GROUPED-ROPE", 3 * 128 * 64 * 64 + 128 * 128 * 128),
        ("BP-ATTN-LINEAR", 4 * 128 * 64 * 64 + 4 * (8 * (16 * 16 * 33 + 2 * 16 * 16 * 17) + 64 * 16 * 17)),
    ):
        assert cost(LIBRARY[name].ir, site).macs == macs
