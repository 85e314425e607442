"""The losses of the tasks, against a plain reference."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper.models import ByteLM, MoEByteLM
from esper.tolaria.tasks import Classification, LanguageModeling


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(0))
    return text[:, :-1], text[:, 1:]


def test_language_modeling_is_the_mean_cross_entropy_of_each_window() -> None:
    torch.manual_seed(0)
    network = ByteLM(d_model=16, layers=1, heads=2, ffn=8, context=16)
    x, y = tokens()
    step = LanguageModeling().losses(network, (x, y))
    each = torch.stack([F.cross_entropy(network(x[i : i + 1])[0], y[i]) for i in range(3)])
    torch.testing.assert_close(step.samples_B, each)
    torch.testing.assert_close(step.objective, each.mean())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_mixtures_routing_losses_are_added_once_by_weight(wrapped: bool) -> None:
    torch.manual_seed(0)
    network: nn.Module = MoEByteLM(d_model=16, layers=1, heads=2, expert_width=4, context=16)
    if wrapped:
        network = esper.wrap(network, targets=["*.after_attn"])
    step = LanguageModeling(balance=2.0, router_z=3.0).losses(network, tokens())
    found = getattr(network, "host", network).auxiliary_losses()
    expected = step.samples_B.mean() + 2.0 * found["load_balance"] + 3.0 * found["router_z"]
    torch.testing.assert_close(step.objective, expected)


def test_classification_counts_what_is_right() -> None:
    logits = nn.Identity()
    step = Classification().losses(logits, (torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1])))
    assert step.metrics["accuracy"] == 0.5
    assert step.samples_B[0] < 0.01 < step.samples_B[1]
