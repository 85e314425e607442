"""Language models of the transformers library as networks: the same logits, the routing losses, and growth."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.leyline.errors import ConfigError
from esper.models.causal_lm import CausalLM
from tests.hf_models import gpt2, llama, mixtral, saved

VOCAB = 50
IDS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {"gpt2": gpt2(VOCAB, 16), "llama": llama(VOCAB, 16, tie_word_embeddings=True), "mixtral": mixtral(VOCAB, 16)}
    return {name: str(saved(root / name, model)) for name, model in made.items()}


@pytest.mark.parametrize(("kind", "make"), [("gpt2", gpt2), ("mixtral", mixtral)])
def test_logits_are_those_of_the_model(kind: str, make: Any, folders: dict[str, str]) -> None:
    network = CausalLM(name=folders[kind])
    assert network.training and network.vocabulary == VOCAB
    with torch.no_grad():
        assert torch.equal(network.eval()(IDS), make(VOCAB, 16).eval()(IDS).logits)


def test_the_experts_losses_are_those_of_their_definition(folders: dict[str, str]) -> None:
    network = CausalLM(name=folders["mixtral"])
    routers = [m for m in network.modules() if type(m).__name__ == "MixtralTopKRouter"]
    seen: list[Tensor] = []
    for router in routers:
        router.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    network(IDS)
    found = network.auxiliary_losses()
    logits = torch.cat(seen).detach()
    used = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 1.0)
    balance = 4 * (used.mean(0) / 2 * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(found["load_balance"].detach(), balance)
    torch.testing.assert_close(found["router_z"].detach(), logits.logsumexp(-1).square().mean())
    sum(found.values(), torch.zeros(())).backward()
    assert all(router.weight.grad is not None and router.weight.grad.abs().sum() > 0 for router in routers)


def test_a_dense_model_and_an_evaluation_have_no_routing_losses(folders: dict[str, str]) -> None:
    dense, mixture = CausalLM(name=folders["gpt2"]), CausalLM(name=folders["mixtral"])
    dense(IDS)
    with torch.no_grad():
        mixture(IDS)
    assert dense.auxiliary_losses() == mixture.auxiliary_losses() == {}


def test_it_copies_right_after_a_step(folders: dict[str, str]) -> None:
    # A mixture that was asked for its router logits is one that transformers itself cannot pickle.
    for network, copied in (
        (CausalLM(name=folders["mixtral"]), copy.deepcopy),
        (CausalLM(name=folders["gpt2"]), lambda m: pickle.loads(pickle.dumps(m))),
    ):
        network(IDS)
        assert torch.equal(copied(network)(IDS), network(IDS))


def test_recomputed_activations_give_the_same_gradients(folders: dict[str, str]) -> None:
    def gradients(**given: bool) -> list[Tensor]:
        network = CausalLM(name=folders["llama"], **given)  # type: ignore[arg-type]
        network(IDS).square().mean().backward()
        return [p.grad for p in network.parameters() if p.grad is not None]

    for a, b in zip(gradients(), gradients(gradient_checkpointing=True), strict=True):
        torch.testing.assert_close(a, b)


def test_a_configuration_alone_starts_at_random(folders: dict[str, str], tmp_path: Path) -> None:
    bare = str(saved(tmp_path / "bare", gpt2(VOCAB, 16), weights=False))
    torch.manual_seed(5)
    first = CausalLM(name=bare)
    torch.manual_seed(5)
    same, other = CausalLM(name=bare), CausalLM(name=bare)
    assert torch.equal(first.eval()(IDS), same.eval()(IDS))
    assert not torch.equal(same(IDS), other.eval()(IDS))
    ignored = CausalLM(name=folders["gpt2"], start="config")
    assert not torch.equal(ignored.eval()(IDS), CausalLM(name=folders["gpt2"]).eval()(IDS))
    with pytest.raises(ConfigError, match="no complete weights"):
        CausalLM(name=bare, start="weights")


def test_weights_are_held_in_the_type_asked_for(folders: dict[str, str]) -> None:
    assert {p.dtype for p in CausalLM(name=folders["llama"], dtype="bfloat16").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in CausalLM(name=folders["llama"]).parameters()} == {torch.float32}


@pytest.mark.parametrize("bad", [{"start": "wieghts"}, {"dtype": "int8"}])
def test_settings_that_are_not_known(bad: dict[str, str], folders: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="one of auto, weights, config"):
        CausalLM(name=folders["llama"], **bad)  # type: ignore[arg-type]


def test_a_saved_folder_brings_the_model_back_with_its_own_weights(folders: dict[str, str], tmp_path: Path) -> None:
    network = CausalLM(name=folders["llama"])
    with torch.no_grad():
        next(network.parameters()).add_(1.0)
    esper.save_model(esper.wrap(network, targets=["*.mlp"]), tmp_path / "saved")
    again = esper.load_model(tmp_path / "saved")
    assert torch.equal(again(IDS), network.eval()(IDS))
    assert isinstance(again.host.get_submodule("lm"), nn.Module)
