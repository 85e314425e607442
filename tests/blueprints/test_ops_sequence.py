"""Shifts, centred convolutions and recurrences, against loops over the tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from esper.blueprints import SiteShape, build, load_library, parse_ir, why_not
from tests.blueprints.growing import one_op, part, stirred

LIBRARY = load_library()


@pytest.mark.parametrize("by", [1, 3, 9])
def test_a_shift_moves_tokens_to_the_right(by):
    x = torch.randn(2, 6, 8)
    wanted = torch.cat([torch.zeros(2, min(by, 6), 8), x[:, : max(0, 6 - by)]], 1)
    assert torch.equal(part("token_shift", by=by)(x), wanted)


def remembered(decay, x, reach):
    """What a token holds of the last `reach` tokens, `decay` and `x` already weighed: (T, C) each."""
    found = torch.zeros_like(x)
    for token in range(len(x)):
        for back in range(min(reach, token + 1)):
            found[token] += decay[token - back + 1 : token + 1].prod(0) * x[token - back]
    return found


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([2, 4, 8, 64]), st.integers(1, 21), st.integers(0, 99))
def test_scans_are_the_recurrence_within_their_reach(reach, tokens, seed):
    torch.manual_seed(seed)
    x, gate = torch.randn(1, tokens, 8), torch.randn(1, tokens, 8)
    fixed = part("decay_scan", reach=reach)
    decay = torch.sigmoid(fixed.weight.detach()).expand(tokens, -1)
    torch.testing.assert_close(fixed(x)[0].detach(), remembered(decay, (1 - decay) * x[0], reach), rtol=1e-4, atol=1e-5)
    opened = torch.sigmoid(gate[0])
    found = part("gated_scan", inputs=2, reach=reach)(gate, x)[0]
    torch.testing.assert_close(found, remembered(1 - opened, opened * x[0], reach), rtol=1e-4, atol=1e-5)


def test_a_reach_beyond_the_text_is_the_whole_recurrence():
    gate, x, state = torch.randn(1, 12, 8), torch.randn(1, 12, 8), torch.zeros(8)
    found = part("gated_scan", inputs=2, reach=16)(gate, x)
    for token in range(12):
        opened = torch.sigmoid(gate[0, token])
        state = (1 - opened) * state + opened * x[0, token]
        torch.testing.assert_close(found[0, token], state)


def test_memories_start_spread_from_two_tokens_to_the_reach():
    decay = torch.sigmoid(part("decay_scan", width=16, reach=256).weight.detach())
    memory = 1 / (1 - decay)
    assert memory[0].item() == pytest.approx(2) and memory[-1].item() == pytest.approx(256, rel=1e-3)
    assert (memory.diff() > 0).all()


def test_low_precision_keeps_long_memories():
    scan, x = part("decay_scan", width=16), torch.randn(2, 300, 16)
    torch.testing.assert_close(scan(x.bfloat16()).float(), scan(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kernel", [3, 7])
def test_a_centred_convolution_sees_both_sides_alike(kernel):
    conv, x = part("centred_conv", kernel=kernel), torch.randn(2, 6, 8)
    changed = x.clone()
    changed[:, 3] += 1
    moved = (conv(changed) - conv(x)).abs().sum((0, 2)) > 1e-6
    assert moved.tolist() == [abs(token - 3) <= kernel // 2 for token in range(6)]


def test_a_dilated_convolution_skips_tokens():
    ir = one_op("decay_scan").model_dump() | {
        "nodes": [{"id": "it", "op": "causal_conv", "attrs": {"out": "d_out", "kernel": 3, "dilation": 4}}]
    }
    conv, x = build(parse_ir(ir), SiteShape("btd", 8, 8, 12), seed=0), torch.randn(1, 12, 8)
    changed = x.clone()
    changed[:, 1] += 1
    moved = (conv(changed) - conv(x)).abs().sum((0, 2)) > 1e-6
    assert [token for token in range(12) if moved[token]] == [1, 5, 9]


def test_the_canon_layer_is_a_residual_convolution_over_four_tokens():
    child = build(LIBRARY["BP-CANON"].ir, SiteShape("btd", 8, 8, 6, "norm"), seed=0)
    x = torch.randn(2, 6, 8)
    assert not child(x).any()
    stirred(child)
    past = F.pad(x, (0, 0, 3, 0))
    wanted = sum(past[:, back : back + 6] * child.mix.conv.weight[:, 0, back] for back in range(4))
    torch.testing.assert_close(child(x), wanted)
    assert sum(p.numel() for p in child.parameters()) == 4 * 8


@pytest.mark.parametrize("kind", ["norm", "linear", "stream", "mlp", "attention", "block"])
def test_the_canon_layer_has_its_four_places(kind):
    assert why_not(LIBRARY["BP-CANON"].ir, SiteShape("btd", 8, 24, 6, kind)) is None


def test_gate_and_value_are_equally_wide():
    nodes = [
        {"id": "g", "op": "linear", "attrs": {"out": 4}},
        {"id": "it", "op": "gated_scan", "inputs": ["g", "input"]},
    ]
    ir = parse_ir({"name": "BP-TRY", "layouts": ["btd"], "nodes": nodes, "output": "it"})
    assert "make them equal" in why_not(ir, SiteShape("btd", 8, 8, 6))
