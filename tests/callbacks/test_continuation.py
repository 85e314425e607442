"""A run's own hook: it says what the model says, on time, and changes nothing."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn

from callbacks.continuation import Continuation, continued
from esper.leyline.errors import ConfigError
from esper.models import ByteLM
from esper.run import run
from tests.test_conf import TINY_TEXT, composed, keys_of

RECIPE = "+callbacks=continuation"


class Next(nn.Module):
    """Finds the byte after the last one likeliest, and notes the lengths of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[int] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen.append(tokens.shape[1])
        return nn.functional.one_hot((tokens + 1) % 256, 256).float() + self.weight


def test_each_byte_is_the_likeliest_after_those_before() -> None:
    assert continued(Next(), "abc", length=4, context=8) == b"defg"


def test_the_model_is_given_no_more_than_its_context() -> None:
    model = Next()
    assert continued(model, "abc", length=4, context=4) == b"defg"
    assert model.seen == [3, 4, 4, 4]


def test_modes_and_random_numbers_stay_as_they_are() -> None:
    model = ByteLM(d_model=8, heads=2).train()
    model.blocks[0].eval()
    seed_everything(3, verbose=False)
    expected = torch.rand(1)
    seed_everything(3, verbose=False)
    continued(model, "x", length=2, context=128)
    assert torch.equal(torch.rand(1), expected)
    assert model.training and model.blocks[1].training and not model.blocks[0].training


@pytest.mark.parametrize("wrong", [{"prompt": ""}, {"length": 0}, {"every": 0}, {"context": 0}])
def test_values_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Continuation(**wrong)


def test_what_is_due_survives_a_checkpoint() -> None:
    hook = Continuation(every=10)
    hook._due = 30
    fresh = Continuation(every=10)
    fresh.load_state_dict(hook.state_dict())
    assert fresh._due == 30


def test_the_recipe_keeps_the_checkpoints_and_lists_every_setting(tmp_path: Path) -> None:
    usual, hooked = (composed(*extra, folder=tmp_path)["trainer"]["callbacks"] for extra in ([], [RECIPE]))
    assert hooked[:-1] == usual
    assert set(hooked[-1]["init_args"]) == keys_of(Continuation)


@pytest.mark.slow
def test_a_run_writes_them_and_is_the_same_run(tmp_path: Path) -> None:
    short = [*TINY_TEXT, "data.init_args.steps_per_epoch=4", "trainer.val_check_interval=2", "compare=false"]
    plain = composed("+experiment=bytelm", *short, folder=tmp_path / "plain")
    hooked = composed("+experiment=bytelm", RECIPE, *short, folder=tmp_path / "hooked")
    hooked["trainer"]["callbacks"][-1]["init_args"] |= {"prompt": "if ", "length": 5, "every": 3, "context": 16}
    losses = [run(config).grown.decision_loss for config in (plain, hooked)]
    assert losses[0] == losses[1]
    said = (tmp_path / "hooked" / "continuations.txt").read_text(encoding="utf-8")
    assert said.startswith("--- step 4\nif ") and said.count("---") == 1
