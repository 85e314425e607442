"""Copies of nested state are deep both ways, and go back into the very objects that they were taken from."""

import torch
from torch import nn

from esper.tolaria.kept import Copier, KeptModules, give_back, same_bits


def test_a_snapshot_is_deep_both_ways() -> None:
    optimizer_state = {"step": torch.tensor(3.0), "nested": [torch.ones(2), {"plain": (1, "a")}]}
    kept = Copier("cpu").value(optimizer_state)
    optimizer_state["nested"][0].fill_(9.0)
    first = give_back(kept)
    assert first["nested"][0] is optimizer_state["nested"][0]
    assert torch.equal(first["nested"][0], torch.ones(2))
    first["nested"].append("changed")
    first["nested"][0].zero_()
    again = give_back(kept)
    assert len(again["nested"]) == 2 and torch.equal(again["nested"][0], torch.ones(2))


def test_modules_come_back_with_tied_and_expanded_and_lazy_tensors() -> None:
    module = nn.Module()
    module.one = nn.Linear(2, 2)
    module.two = nn.Linear(2, 2)
    module.two.weight = module.one.weight
    module.register_buffer("wide", torch.zeros(1).expand(4))
    module.register_buffer("absent", None)
    module.lazy = nn.LazyLinear(3)
    before = {name: p.detach().clone() for name, p in module.named_parameters() if name[:4] != "lazy"}
    kept = KeptModules(module, Copier("cpu"))
    with torch.no_grad():
        module.one.weight.fill_(5)
    module.wide = torch.ones(4)
    module.two.weight = nn.Parameter(torch.zeros(2, 2))
    module.one.weight.grad = torch.ones(2, 2)
    kept.put_back()
    assert module.two.weight is module.one.weight and module.one.weight.grad is None
    assert all(torch.equal(before[name], module.get_parameter(name)) for name in before)
    assert torch.equal(module.wide, torch.zeros(4)) and module.absent is None


def test_bits_tell_what_numbers_do_not() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.int8):
        one = torch.ones(2, 3, dtype=dtype)
        assert same_bits(one, one.clone()) and not same_bits(one, one[:1]) and not same_bits(one, 0 * one)
    assert not same_bits(torch.ones(2), torch.ones(2, dtype=torch.float64))
