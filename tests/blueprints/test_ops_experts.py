"""Mixtures: what routed experts compute, what the auxiliary loss adds, and that all of them learn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from esper.blueprints import SiteShape, build, cost, why_not
from esper.blueprints.ops_experts import BlockProduct
from esper.blueprints.routing import uneven
from tests.blueprints.growing import LIBRARY, one_op, part, stirred

MIXTURES = ("BP-CAP-FUSE-HFFN", "BP-LOAD-BAL-EMA", "BP-ROUTER-MOE-AUXLOSS", "BP-ROUTER-TOP2")


def experts(layout="btd", **attrs):
    return stirred(part("experts", layout=layout, out=8, hidden=5, **attrs))


def by_hand(mixture, x, fn=F.gelu):
    """Every token through every expert, weighed by what the router says."""
    _, weights, _ = mixture.router(x)
    made = [F.linear(fn(F.linear(x, up)), down) for up, down in zip(mixture.up, mixture.down, strict=True)]
    return sum(weights[..., number, None] * part for number, part in enumerate(made))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(1, 2), st.sampled_from([40, 100, 125]), st.integers(1, 13), st.integers(0, 99))
def test_gathering_computes_what_every_expert_on_every_token_would(count, k, capacity, tokens, seed):
    torch.manual_seed(seed)
    mixture = experts(experts=count, k=k, capacity=min(capacity, 100 * count // k))
    x = torch.randn(3, tokens, 8)
    torch.testing.assert_close(mixture(x), by_hand(mixture, x), rtol=1e-4, atol=1e-5)


def test_features_without_tokens_are_routed_too():
    mixture, x = experts("bd"), torch.randn(5, 8)
    torch.testing.assert_close(mixture(x), by_hand(mixture, x.unsqueeze(1)).squeeze(1))
    assert ((mixture.router(x.unsqueeze(1))[1] > 0).sum(-1) == 2).all(), "a token alone is never refused"


def test_a_refused_token_gets_nothing():
    mixture, x = experts(k=1, capacity=25), torch.randn(1, 8, 8)
    refused = ~(mixture.router(x)[1] > 0).any(-1)
    assert refused.any() and not refused.all()
    assert not mixture(x)[refused].any()
    assert mixture(x)[~refused].any(-1).all()


@pytest.mark.parametrize("grown", [False, True])
def test_the_router_gets_the_gradient_of_task_loss_and_auxiliary_loss(grown):
    child = build(LIBRARY["BP-ROUTER-MOE-AUXLOSS"].ir, SiteShape("btd", 8, 8, 6), seed=0)
    if grown:
        stirred(child)
    x, target, mixture = torch.randn(4, 6, 8), torch.randn(4, 6, 8), child.mix
    F.mse_loss(child(x), target).backward()
    found = {name: p.grad.clone() for name, p in child.named_parameters()}
    child.zero_grad()
    mixture.router.balance = "none"
    normed = F.layer_norm(x, (8,))
    chances = torch.softmax(F.linear(normed, mixture.router.weight), -1)
    chosen = F.one_hot(chances.argmax(-1), 4)
    auxiliary = uneven(chances, chosen)
    (F.mse_loss(child(x), target) + 0.01 * auxiliary).backward()
    for name, parameter in child.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)
    assert found["mix.router.weight"].any(), "at birth the auxiliary loss alone moves the router"
    if not grown:
        weight = mixture.router.weight
        alone = 0.01 * uneven(torch.softmax(F.linear(normed, weight), -1), chosen)
        torch.testing.assert_close(found["mix.router.weight"], *torch.autograd.grad(alone, weight))


def test_in_evaluation_there_is_no_auxiliary_loss():
    child = build(LIBRARY["BP-ROUTER-MOE-AUXLOSS"].ir, SiteShape("btd", 8, 8, 6), seed=0).eval()
    child(torch.randn(2, 6, 8)).sum().backward()
    assert not child.mix.router.weight.grad.any()


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_learns(name):
    child = build(LIBRARY[name].ir, SiteShape("btd", 8, 8, 6), seed=0)
    optimizer, x = torch.optim.Adam(child.parameters(), lr=0.02), torch.randn(32, 6, 8)
    before, target = child.mix.up.detach().clone(), torch.sin(3 * x)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(child(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert ((child.mix.up - before).flatten(1).norm(dim=1) > 0.05).all()
    assert child.mix.router.weight.grad.any()


def test_the_manifests_tell_the_capacity():
    site = SiteShape("btd", 64, 64, 128)
    for name in MIXTURES:
        blueprint = LIBRARY[name]
        node = next(node for node in blueprint.ir.nodes if node.op == "experts")
        k, capacity = node.attrs["k"], node.attrs["capacity"]
        assert blueprint.manifest.capacity_factor == capacity / 100
        assert blueprint.manifest.max_tokens_per_expert == -(-site.tokens * k * capacity // 400)


def test_the_softmax_keeps_the_largest():
    x = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    wanted = torch.softmax(torch.tensor([3.0, 2.0]), 0)
    torch.testing.assert_close(part("choose", width=4, layout="bd", k=2)(x)[0, 1:3], wanted)
    assert part("choose", width=4, layout="bd", k=2)(x)[0, [0, 3]].tolist() == [0, 0]
    torch.testing.assert_close(part("choose", width=4, layout="bd", k=4)(x), x.softmax(-1))


def test_blocks_are_weighed_as_a_whole():
    x, shares = torch.randn(3, 6), torch.tensor([[2.0, 0.0]]).expand(3, 2)
    assert torch.equal(BlockProduct(2)(x, shares), torch.cat([2 * x[:, :3], 0 * x[:, 3:]], 1))


@pytest.mark.parametrize(
    ("attrs", "complaint"),
    [
        ({"k": 5}, "cannot go to 5 of 4 experts"),
        ({"k": 4, "capacity": 101}, "hold more than every token"),
    ],
)
def test_what_cannot_be_routed(attrs, complaint):
    ir = one_op("experts", out="d_out", hidden=4, **attrs)
    assert complaint in why_not(ir, SiteShape("btd", 8, 8, 6))
    assert "cannot be kept of 8" in why_not(one_op("choose", k=9), SiteShape("btd", 8, 8, 6))


def test_known_costs():
    found = cost(LIBRARY["BP-ROUTER-TOP2"].ir, SiteShape("btd", 64, 64, 128), {"h": 16})
    assert found == (4 * (64 + 16 * 128), 4 * (128 * 64 + 80 * 16 * 128))
