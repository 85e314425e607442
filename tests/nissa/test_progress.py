from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from torch import nn

from esper.kasmina.wrapper import MorphableModel, wrap
from esper.kasmina.writer import Moment
from esper.nissa.progress import GrowthProgress, growth_text
from esper.tamiyo.callback import Tamiyo
from esper.tamiyo.controller import TamiyoController
from tests.helpers import QUICK, Plain, digits, planting, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


def model() -> MorphableModel:
    torch.manual_seed(0)
    return wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


def test_nothing_grown_is_no_text() -> None:
    assert growth_text(model().bank) == ""


def test_stages_and_alpha_are_shown() -> None:
    morphable = model()
    morphable(torch.randn(3, 4)).sum().backward()
    morphable.eval()(torch.randn(3, 4))
    morphable.train()
    for layer in morphable.bank.all_layers():
        layer.finish_probe()
    settings = {"policy": "schedule", "schedule": ({"at": 1, "blueprint": "BP-MLP-GELU"},), "budget": 500}
    controller = TamiyoController(morphable, settings)
    for step in range(5, 500):
        controller.step(controller.observe(Moment("r", 0, step)))
        if morphable.bank.grafted():
            break
        sleep(0.01)  # The kernel is built on another thread.
    controller.close()
    (graft,) = morphable.bank.grafted().values()
    graft.set_alpha(0.351)
    assert growth_text(morphable.bank) == "1 GRAFTING α .35"
    graft.set_alpha(1.0)
    assert growth_text(morphable.bank) == "1 GRAFTING α 1.00"


@pytest.mark.parametrize("grows", [True, False])
def test_the_bar_runs_with_and_without_tamiyo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grows: bool) -> None:
    seen: list[Any] = []
    original = GrowthProgress.get_metrics

    def spy(self: GrowthProgress, *args: Any) -> Any:
        seen.append(original(self, *args))
        return seen[-1]

    monkeypatch.setattr(GrowthProgress, "get_metrics", spy)
    callback = Tamiyo("schedule", kasmina=QUICK, settings=planting(), targets=["net.*"])
    callbacks = [callback, GrowthProgress()] if grows else [GrowthProgress()]
    fit = trainer(tmp_path, None, epochs=5, callbacks=callbacks, enable_progress_bar=True, enable_checkpointing=False)
    fit.fit(Plain(), datamodule=digits())
    texts = {metrics.get("seeds", "") for metrics in seen}
    assert texts == {""} if not grows else any("GRAFTING α" in str(text) for text in texts)


def test_a_run_without_a_last_epoch_shows_none(tmp_path: Path) -> None:
    bar = GrowthProgress()
    fit = trainer(tmp_path, None, epochs=-1, max_steps=2, callbacks=[bar], enable_progress_bar=True)
    fit.fit(Plain(), datamodule=digits())
    assert bar._get_train_description(3).split() == ["Epoch", "3"]
