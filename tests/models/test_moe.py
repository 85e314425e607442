"""The mixture of experts: equal to its definition, balanced losses of known value, safe to copy."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.leyline.errors import ConfigError
from esper.models import MoEByteLM
from esper.models.moe import MixtureOfExperts, load_balance


def by_definition(layer: MixtureOfExperts, token: Tensor) -> Tensor:
    """One token's output, expert by expert."""
    width = layer.expert_width
    top, chosen = layer.router(token).softmax(-1).topk(layer.top_k)
    out = torch.zeros_like(token)
    for share, expert in zip(top / top.sum(), chosen.tolist(), strict=True):
        rows = slice(expert * width, (expert + 1) * width)
        out = out + share * layer.down.weight[:, rows] @ layer.act(layer.up.weight[rows] @ token)
    return out


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_output_is_the_weighted_sum_of_the_chosen_experts(top_k: int) -> None:
    torch.manual_seed(0)
    layer = MixtureOfExperts(d_model=8, experts=4, expert_width=3, top_k=top_k)
    x = torch.randn(2, 5, 8)
    expected = torch.stack([by_definition(layer, token) for token in x.flatten(0, 1)]).view_as(x)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_each_expert_starts_like_a_network_of_its_own() -> None:
    layer = MixtureOfExperts(d_model=64, experts=8, expert_width=16, top_k=2)
    assert float(layer.down.weight.detach().abs().max()) == pytest.approx(1 / 4, rel=0.01)
    assert float(layer.up.weight.detach().abs().max()) == pytest.approx(1 / 8, rel=0.01)


@given(st.integers(1, 8), st.integers(1, 5))
def test_load_balance_of_even_routing_is_one(experts: int, rounds: int) -> None:
    probabilities = torch.full((experts * rounds, experts), 1 / experts)
    chosen = torch.arange(experts * rounds).remainder(experts)[:, None]
    assert float(load_balance(probabilities, chosen)) == pytest.approx(1)


@given(st.integers(2, 8))
def test_load_balance_of_one_expert_for_all_is_their_number(experts: int) -> None:
    probabilities = torch.nn.functional.one_hot(torch.zeros(6, dtype=torch.long), experts).float()
    assert float(load_balance(probabilities, torch.zeros(6, 1, dtype=torch.long))) == pytest.approx(experts)


def test_even_router_gives_the_known_losses() -> None:
    model = MoEByteLM(d_model=8, heads=2, top_k=4)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            torch.nn.init.zeros_(parameter)
    model(torch.zeros(1, 6, dtype=torch.long))
    losses = model.auxiliary_losses()
    assert losses["load_balance"].item() == pytest.approx(1)
    assert losses["router_z"].item() == pytest.approx(math.log(4) ** 2)


def test_losses_teach_the_router() -> None:
    torch.manual_seed(0)
    model = MoEByteLM(d_model=8, heads=2)
    model(torch.arange(12)[None])
    sum(model.auxiliary_losses().values(), torch.zeros(())).backward()
    assert all(float(p.grad.abs().sum()) > 0 for n, p in model.named_parameters() if ".router." in n)


def test_losses_are_of_the_last_forward_and_left_out_of_copies() -> None:
    torch.manual_seed(0)
    model = MoEByteLM(d_model=8, heads=2)
    assert model.auxiliary_losses() == {}
    model(torch.arange(12)[None])
    first = model.auxiliary_losses()["router_z"].item()
    model(torch.arange(40, 52)[None])
    assert first != model.auxiliary_losses()["router_z"].item()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.auxiliary_losses() == {}
    assert model.auxiliary_losses()["router_z"].requires_grad


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_out_of_range(top_k: int) -> None:
    with pytest.raises(ConfigError, match=f"top_k={top_k} must be between 1 and experts=4"):
        MoEByteLM(top_k=top_k)
