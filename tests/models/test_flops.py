"""Work counts agree with counting by hand, and counting changes nothing."""

import copy

import torch
from torch import nn

from esper.models import MLP, ByteLM, MoEByteLM, macs


def test_attention_and_products_are_counted() -> None:
    d, layers, ffn, time, batch, vocab = 64, 3, 16, 128, 2, 256
    per_token = layers * (4 * d * d + 2 * time * d + 2 * d * ffn) + d * vocab
    assert macs(ByteLM(), torch.zeros(batch, time, dtype=torch.long)) == batch * time * per_token


def test_all_experts_are_charged() -> None:
    example = torch.zeros(1, 128, dtype=torch.long)
    few, many = (macs(MoEByteLM(top_k=k), example) for k in (1, 4))
    assert few == many
    wider = macs(MoEByteLM(expert_width=24), example)
    assert wider - few == 2 * 128 * (2 * 64 * 4 * 8)


def test_convolutions_and_several_inputs() -> None:
    assert macs(nn.Conv2d(2, 3, 3, padding=1), torch.zeros(1, 2, 5, 5)) == 25 * 3 * 2 * 9
    assert macs(nn.MultiheadAttention(4, 2, bias=False), (torch.zeros(3, 1, 4),) * 3) == 4 * 3 * 16 + 2 * 3 * 3 * 4


def test_counting_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    macs(model, torch.randn(3, 4, generator=torch.Generator()))
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert macs(MLP(), torch.zeros(1, 2)) == 2 * 16 + 16 * 3 + 3 * 16 + 16 * 16 + 16 * 2
