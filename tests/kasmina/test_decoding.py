"""The key-value cache of a language model, and children that mix tokens.

With real language models of the transformers library this is tried in `tests/compat`.
"""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import STANDARD, load_library
from esper.kasmina.decoding import mixes_tokens
from esper.leyline.errors import ConfigError
from tests.kasmina.conftest import Rig, S, wake

MIXING = ("BP-ATTN-STD", "BP-CONV-CAUSAL")


class Cache:
    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


class Writer(nn.Module):
    """A module that says how it writes text, as those of the transformers library do."""

    def __init__(self, use_cache: bool | None = True) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.generation_config = SimpleNamespace(use_cache=use_cache)

    def forward(self, x: Tensor, past_key_values: Any = None) -> Tensor:
        return self.body(x)


def writing(blueprint: str, use_cache: bool | None = True) -> Rig:
    """A host whose inner module writes text, with a child at work in it."""
    torch.manual_seed(0)
    rig = Rig(nn.Sequential(Writer(use_cache)), torch.randn(2, 4, 8), targets=["0.body"])
    wake(rig.grow("0.body#0.0", S.GRAFTING, blueprint=blueprint, alpha=1.0))
    return rig


def writer(rig: Rig) -> Any:
    return rig.model.host[0]


def go_on(rig: Rig, length: int) -> Tensor:
    with torch.no_grad():
        return writer(rig.model.eval() and rig)(rig.x, past_key_values=Cache(length))


def test_which_blueprints_mix_tokens() -> None:
    assert {name for name in STANDARD if mixes_tokens(load_library()[name].ir.model_dump())} == set(MIXING)


@pytest.mark.parametrize("blueprint", MIXING)
@pytest.mark.parametrize("use_cache", [True, None])
def test_the_cache_is_closed_while_such_a_child_lives(
    blueprint: str, use_cache: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    rig = writing(blueprint, use_cache)
    assert writer(rig).generation_config.use_cache is False
    assert [r.message for r in caplog.records] == [
        "0.body#0.0 mixes tokens; generate() runs without key-value cache from now on."
    ]
    rig.cull("0.body#0.0")
    assert writer(rig).generation_config.use_cache is use_cache
    go_on(rig, 3)


def test_a_child_that_works_token_by_token_leaves_the_cache_alone() -> None:
    rig = writing("BP-MLP-GELU")
    assert writer(rig).generation_config.use_cache is True
    go_on(rig, 3)


def test_a_forward_from_a_filled_cache_is_refused() -> None:
    rig = writing("BP-CONV-CAUSAL")
    with pytest.raises(ConfigError, match=r"child at 0\.body#0\.0 mixes tokens.*use_cache=False"):
        go_on(rig, 3)
    go_on(rig, 0)
    writer(rig)(rig.x, past_key_values=Cache(3)).sum().backward()


def test_a_child_that_adds_nothing_may_continue_from_a_cache() -> None:
    rig = writing("BP-CONV-CAUSAL")
    graft = next(iter(rig.bank.grafted().values()))
    graft.set_alpha(0.0)
    go_on(rig, 3)


def test_the_last_of_several_children_opens_the_cache() -> None:
    rig = writing("BP-CONV-CAUSAL")
    rig.grow("0.body#0.1", S.GRAFTING, blueprint="BP-ATTN-STD", alpha=1.0)
    rig.cull("0.body#0.0")
    assert writer(rig).generation_config.use_cache is False
    rig.cull("0.body#0.1")
    assert writer(rig).generation_config.use_cache is True


def test_copies_and_unwrapping() -> None:
    rig = writing("BP-CONV-CAUSAL")
    twin = copy.deepcopy(rig.model)
    rig.bank.detach()
    assert writer(rig).generation_config.use_cache is True
    assert not writer(rig)._forward_pre_hooks
    assert twin.host[0].generation_config.use_cache is False
    with pytest.raises(ConfigError), torch.no_grad():
        twin.eval().host[0](rig.x, past_key_values=Cache(3))


def test_a_restored_model_closes_its_cache_too() -> None:
    rig, other = writing("BP-CONV-CAUSAL"), Rig(nn.Sequential(Writer()), torch.randn(2, 4, 8), targets=["0.body"])
    other.model.load_state_dict(rig.model.state_dict())
    assert writer(other).generation_config.use_cache is False
