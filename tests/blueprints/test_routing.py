"""The router: who goes where, in what order, how many at most, and how the load is evened out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.blueprints.routing import Router, uneven


def router(experts=4, k=2, capacity=125, **more):
    made = Router(8, experts, k, capacity, **more)
    torch.nn.init.normal_(made.weight)
    return made


def seated_by_hand(wanted, experts, k, capacity):
    """Let the tokens of one sample come one by one; return who got which place with whom."""
    held, places = [0] * experts, {}
    for token, chances in enumerate(wanted):
        limit = math.ceil((token + 1) * k * capacity / (100 * experts))
        for expert in torch.topk(chances, k).indices.tolist():
            if held[expert] < limit:
                places[token, expert] = held[expert]
                held[expert] += 1
    return places


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 5), st.integers(1, 2), st.sampled_from([50, 100, 125]), st.integers(1, 17), st.integers(0, 999))
def test_places_go_to_whom_comes_first(experts, k, capacity, tokens, seed):
    torch.manual_seed(seed)
    capacity = min(capacity, 100 * experts // k)
    made, x = router(experts, k, capacity), torch.randn(2, tokens, 8)
    who, weights, places = made(x)
    assert who.shape == (2, experts, math.ceil(tokens * k * capacity / (100 * experts)))
    chances = torch.softmax(x @ made.weight.T, -1)
    for sample in range(2):
        wanted = seated_by_hand(chances[sample], experts, k, capacity)
        taken = {(t, e) for t, e in (weights[sample] > 0).nonzero().tolist()}
        assert taken == set(wanted)
        for (token, expert), place in wanted.items():
            assert places[sample, token, expert] == place
            assert who[sample, expert, place] == token


@pytest.mark.parametrize("k", [1, 2])
def test_weights_are_chances_or_shares(k):
    made, x = router(k=k, capacity=400 // k), torch.randn(3, 4, 8)
    _, weights, _ = made(x)
    chances = torch.softmax(x @ made.weight.T, -1)
    best = torch.topk(chances, k, -1)
    wanted = best.values if k == 1 else best.values / best.values.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.gather(-1, best.indices), wanted)
    assert ((weights > 0).sum(-1) == k).all()


def test_a_prefix_gets_what_it_got_in_the_whole():
    made, x = router(capacity=60), torch.randn(2, 12, 8)
    _, whole, _ = made(x)
    assert (whole > 0).sum() < 2 * 12 * 2, "somebody must be refused for this to show anything"
    for tokens in range(1, 12):
        torch.testing.assert_close(made(x[:, :tokens])[1], whole[:, :tokens])


def test_the_uneven_load_costs_more():
    even, skew = torch.full((1, 8, 4), 0.25), torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(1, 8, 4)
    first = torch.nn.functional.one_hot(torch.zeros(1, 8, dtype=torch.int64), 4)
    assert uneven(even, even).item() == pytest.approx(1.0)
    assert uneven(skew, first).item() == pytest.approx(4 * 0.7)


def test_offsets_move_against_the_mean_load():
    """Every token prefers expert 0; with time the offsets send them elsewhere."""
    made = Router(8, 4, 1, 400, balance="bias", strength=0.05)
    with torch.no_grad():
        made.weight.zero_()
        made.weight[0, 0] = 1.0
    x = torch.ones(2, 6, 8)
    made(x)
    assert not made.bias.any(), "what a pass finds counts from the next one on"
    assert made.recent.tolist() == [1.0, 0.0, 0.0, 0.0]
    made(x)
    torch.testing.assert_close(made.bias, 0.05 * torch.tensor([-1.0, 1.0, 1.0, 1.0]))
    loads = []
    for _ in range(60):
        made(x)
        loads.append(made.recent.clone())
    share = torch.stack(loads[-40:]).mean(0)
    assert (share - 0.25).abs().max() < 0.1, share


def test_offsets_rest_in_evaluation_and_where_the_router_is_frozen():
    made, x = router(balance="bias"), torch.randn(2, 6, 8)
    made(x)
    before = {name: b.clone() for name, b in made.named_buffers()}
    made.eval()(x)
    assert all(torch.equal(b, before[name]) for name, b in made.named_buffers())
    made.train().requires_grad_(False)(x)
    assert torch.equal(made.bias, before["bias"])
