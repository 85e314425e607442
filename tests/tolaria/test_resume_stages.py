"""A run that was saved while a seed waits, for its kernel or for its judgement, resumes bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

import esper
from esper.kasmina.kernels import Kernel, KernelRequest
from esper.kasmina.library_store import LibraryKernelStore
from esper.kasmina.writer import Moment
from esper.leyline.commands import KasminaControlCommand
from esper.leyline.states import SeedCommand
from tests.helpers import planting
from tests.tolaria.runs import MEASURED, Run, assert_same, resumed

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class SlowStore(LibraryKernelStore):
    """Has a kernel only from a step of the run on, so that an interruption does not change when."""

    def __init__(self, ready: dict[str, int]) -> None:
        super().__init__()
        self.ready, self.trainer = ready, None

    def poll(self, request: KernelRequest) -> Kernel | None:
        assert isinstance(self.trainer, Trainer)
        waits = self.trainer.global_step < self.ready.get(request.blueprint, 0)
        return None if waits else super().poll(request)


class Told(Callback):
    """Gives the store its clock, and germinates a seed by hand between two boundaries if asked to."""

    def __init__(self, store: SlowStore, germinate_at: int = -1) -> None:
        self.store, self.germinate_at = store, germinate_at

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.store.trainer = trainer

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.germinate_at:
            tamiyo = next(c for c in trainer.callbacks if isinstance(c, esper.Tamiyo))  # type: ignore[attr-defined]
            assert tamiyo.controller is not None
            command = KasminaControlCommand(
                command=SeedCommand.GERMINATE,
                target_layer_id="net.2",
                target_seed_id="net.2#0.0",
                blueprint_id="BP-MLP-GELU",
            )
            tamiyo.controller.writer.apply([command], Moment(tamiyo.controller.run_id, 0, trainer.global_step))


def saved_states(run: Run) -> dict[str, tuple[str, ...]]:
    """Return the seeds' states in every checkpoint that a run has written."""
    found = {}
    for file in sorted((run.folder / "kept").iterdir()):
        topology = torch.load(file, weights_only=True)["esper"]["topology"]
        found[file.stem] = tuple(sorted(entry["state"] for entry in topology))
    return found


def given(ready: dict[str, int], germinate_at: int = -1, **more: Any) -> dict[str, Any]:
    store = SlowStore(ready)
    return {"store": store, "callbacks": [Told(store, germinate_at)], "max_epochs": 3} | more


@pytest.mark.slow
def test_saved_while_a_seed_is_LOADING(tmp_path: Path) -> None:
    # Germinated at the boundary behind step 10; its kernel is there at the boundary behind step 20.
    ready = {"BP-MLP-GELU": 17}
    whole = Run(tmp_path / "whole", **given(ready)).fit()
    states = saved_states(whole)
    assert states["batch-21"] == ("GRAFTING",)
    for hook, batches in (("batch", 14), ("validation", 15)):
        assert states[f"{hook}-{batches}"] == ("LOADING",)
        part = resumed(whole, whole.at(hook, batches), tmp_path / hook, **given(ready))
        assert_same(whole, part, batches=batches)
    # A boundary decides in rounds until nothing is left to do, so no policy leaves a seed GERMINATED behind it.
    assert not [name for name, seeds in states.items() if "GERMINATED" in seeds]


@pytest.mark.slow
def test_saved_while_a_seed_is_GERMINATED(tmp_path: Path) -> None:
    settings = planting(at=1000)
    whole = Run(tmp_path / "whole", **given({}, 12, settings=settings)).fit()
    assert saved_states(whole)["batch-13"] == ("GERMINATED",) and saved_states(whole)["batch-16"] == ("GRAFTING",)
    part = resumed(whole, whole.at("batch", 13), tmp_path / "part", **given({}, 12, settings=settings))
    assert_same(whole, part, batches=13)


@pytest.mark.slow
def test_saved_while_a_seed_is_EVALUATING(tmp_path: Path) -> None:
    # One kernel of a trial comes late: the members that are done wait for it, so that all are judged together.
    def trial() -> dict[str, Any]:
        menu = ("BP-MLP-GELU", "BP-PROJ-LORA")
        settings = {"start": 5, "period": 1000, "below_standout": "nothing", "menu": menu, "decision_samples": 64}
        settings |= {"budget": 3000, "proxy": 300, "price_per_kparam": 0.0}
        quick = MEASURED | {"stabilization_steps": 4}
        return given({"BP-PROJ-LORA": 22}, policy="heuristic", settings=settings, kasmina=quick, max_epochs=4)

    whole = Run(tmp_path / "whole", **trial()).fit()
    states = saved_states(whole)
    assert states["batch-22"] == ("EVALUATING", "LOADING"), states
    part = resumed(whole, whole.at("batch", 22), tmp_path / "part", **trial())
    assert_same(whole, part, batches=22)
