"""A resumed run is the uninterrupted one, bit for bit: from any step, in every stage, whatever hook saved it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import esper
from esper.leyline.errors import CheckpointError
from esper.run import run
from esper.tolaria.pause import Pause
from esper.tolaria.resume import chosen, newest
from tests.helpers import Plain, digits, planting
from tests.tolaria.runs import MEASURED, STRICT, Dropping, Run, assert_same, resumed

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Esper. no test loader"),
]
Places = list[tuple[str, int]]


def check(folder: Path, places: Places, **given: Any) -> Run:
    """Train once without interruption, and once more from each of the places."""
    whole = Run(folder / "whole", **given).fit()
    for hook, batches in places:
        module = {"module": type(given["module"])()} if "module" in given else {}
        part = resumed(whole, whole.at(hook, batches), folder / f"{hook}{batches}", **given | module)
        assert_same(whole, part, batches=batches, ended=hook == "end")
    return whole


def stage(run: Run, hook: str, batches: int) -> list[str]:
    return [entry["state"] for entry in torch.load(run.at(hook, batches), weights_only=True)["esper"]["topology"]]


def test_in_the_middle_of_an_epoch_while_a_child_is_ramping(tmp_path: Path) -> None:
    whole = check(tmp_path, [("batch", 12)], max_epochs=3)
    assert stage(whole, "batch", 12) == ["GRAFTING"]


@pytest.mark.slow
def test_in_every_stage_of_the_measured_preset(tmp_path: Path) -> None:
    places: Places = [("batch", n) for n in (1, 5, 9, 11, 15, 17, 20, 29, 44, 50)]
    whole = check(tmp_path, places, kasmina=MEASURED)
    stages = {tuple(stage(whole, *place)) for place in places}
    assert {(), ("GRAFTING",), ("STABILIZATION",), ("FOSSILIZED",)} <= stages


@pytest.mark.slow
def test_in_every_stage_of_the_strict_preset(tmp_path: Path) -> None:
    places: Places = [("batch", n) for n in (9, 12, 16, 24, 33, 38)]
    whole = check(tmp_path, [*places, ("validation", 20)], kasmina=STRICT)
    stages = {tuple(stage(whole, *place)) for place in places}
    assert {("TRAINING",), ("GRAFTING",), ("STABILIZATION",), ("FINE_TUNING",)} <= stages


@pytest.mark.slow
def test_a_culled_seed_under_its_embargo(tmp_path: Path) -> None:
    settings = planting(at=7) | {"price_per_kparam": 100.0}
    whole = check(tmp_path, [("batch", 26)], settings=settings, kasmina=MEASURED | {"embargo_steps": 12}, max_epochs=4)
    assert stage(whole, "batch", 26) == ["CULLED"]


@pytest.mark.slow
def test_in_every_hook_that_may_save(tmp_path: Path) -> None:
    places: Places = [
        ("validation", 5),
        ("validation", 10),
        ("validation", 30),
        ("epoch", 20),
        ("epoch", 30),
        ("end", 30),
    ]
    check(tmp_path, places, max_epochs=3)


@pytest.mark.slow
def test_in_a_run_that_counts_steps(tmp_path: Path) -> None:
    places: Places = [("batch", 4), ("batch", 20), ("batch", 27), ("validation", 10), ("epoch", 10), ("epoch", 20)]
    check(tmp_path, places, max_epochs=-1, max_steps=27)


@pytest.mark.slow
def test_inside_an_accumulation(tmp_path: Path) -> None:
    places: Places = [("batch", 4), ("batch", 14), ("validation", 5), ("batch", 20)]
    whole = check(tmp_path, places, accumulate_grad_batches=3, max_epochs=3)
    assert torch.load(whole.at("batch", 4), weights_only=True)["esper"]["run"]["gradients"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_with_loader_processes(tmp_path: Path) -> None:
    check(tmp_path, [("batch", 14), ("validation", 15), ("epoch", 10)], workers=2, max_epochs=2)


class Plateau(Dropping):
    """A schedule that waits for the validation loss, and one metric object of torchmetrics."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean(loss)
        self.log("object", self.mean, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "object"}}


@pytest.mark.slow
def test_a_plateau_schedule_and_metrics_averaged_over_the_epoch(tmp_path: Path) -> None:
    places: Places = [("batch", 14), ("batch", 20), ("validation", 10), ("epoch", 10)]
    whole = check(tmp_path, places, module=Plateau(), max_epochs=4)
    assert whole.trainer.optimizers[0].param_groups[0]["lr"] < 0.5


# --- loaders of others -------------------------------------------------------------------------------------------


def tensors() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.rand(160, 64, generator=generator), torch.randint(10, (160,), generator=generator))


def foreign() -> tuple[Any, Any]:
    return DataLoader(tensors(), batch_size=16, shuffle=True), DataLoader(tensors(), batch_size=64)


class Counting(DataLoader):  # type: ignore[type-arg]
    """A user's loader that knows its place, and nothing of samplers with epochs."""

    def __init__(self) -> None:
        super().__init__(tensors(), batch_size=16)
        self.passes, self.place, self.resumes = 0, 0, False

    def __iter__(self) -> Any:
        if not self.resumes:
            self.passes, self.place = self.passes + 1, 0
        self.resumes = False
        order = torch.randperm(160, generator=torch.Generator().manual_seed(self.passes)).split(16)
        return self._rest(order)

    def _rest(self, order: Any) -> Any:
        while self.place < len(order):
            self.place += 1
            yield tensors()[order[self.place - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes, "place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes, self.place, self.resumes = state["passes"], state["place"], True


def test_a_shuffling_loader_of_torch_resumes_exactly_from_an_epochs_end(tmp_path: Path) -> None:
    check(tmp_path, [("epoch", 10)], data=foreign(), max_epochs=3)


def test_a_loader_that_cannot_resume_is_named_once(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", data=foreign(), max_epochs=2).fit()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        part = resumed(whole, whole.at("batch", 14), tmp_path / "part", data=foreign(), max_epochs=2)
    told = [str(w.message) for w in caught if "resum" in str(w.message) and issubclass(w.category, UserWarning)]
    ours = [text for text in told if text.startswith("Esper: the training loader (DataLoader) cannot be put back")]
    assert len(ours) == 1 and "after 4 batches" in ours[0] and "state_dict()" in ours[0]
    assert not any(issubclass(w.category, PossibleUserWarning) and "ended before" in str(w.message) for w in caught)
    assert len(part.module.train_losses) == 6 and part.module.train_losses != whole.module.train_losses[14:]


def test_a_users_loader_that_knows_its_place_is_used(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", data=(Counting(), foreign()[1]), max_epochs=3).fit()
    for hook, batches in (("batch", 14), ("epoch", 10), ("validation", 20)):
        data = (Counting(), foreign()[1])
        part = resumed(whole, whole.at(hook, batches), tmp_path / f"{hook}{batches}", data=data, max_epochs=3)
        assert_same(whole, part, batches=batches)


# --- moments that do not do --------------------------------------------------------------------------------------


class Failing(Dropping):
    """Raises in the middle of a step, or behind it."""

    where = "backward"

    def on_after_backward(self) -> None:
        if self.where == "backward" and self.global_step == 7:
            raise RuntimeError("the machine stumbled")

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if self.where == "step" and self.global_step == 7:
            raise RuntimeError("the machine stumbled")


@pytest.mark.filterwarnings("ignore:Esper. the checkpoint that is being written cannot be resumed")
@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize("where", ["backward", "step"])
def test_what_is_saved_in_the_middle_of_a_step_is_never_resumed(tmp_path: Path, where: str) -> None:
    module = Failing()
    module.where = where
    saver = OnExceptionCheckpoint(tmp_path / "run" / "kept")
    run = Run(tmp_path / "run", module=module, max_epochs=1, callbacks=[saver])
    with pytest.raises(RuntimeError, match="stumbled"):
        run.fit()
    torn = tmp_path / "run" / "kept" / "on_exception.ckpt"
    assert torch.load(torn, weights_only=True)["esper"]["run"]["pause"] == Pause.TORN
    with pytest.raises(CheckpointError, match="middle of a training step"):
        Run(tmp_path / "again", max_epochs=1).fit(torn)
    with pytest.warns(UserWarning, match=r"passed over.*on_exception.*middle of a training step"):
        assert newest(tmp_path / "run") == run.at("batch", 7)


def test_an_exception_writes_no_checkpoint_of_our_own(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3)
    run = Run(tmp_path / "run", module=Failing(), max_epochs=1, callbacks=[keep])
    with pytest.raises(RuntimeError, match="stumbled"):
        run.fit()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["epoch=0-step=6.ckpt"]


class Early(Callback):
    """A user's own way to save, listed before Tamiyo."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "early.ckpt")


def test_a_checkpoint_that_came_too_early_says_so(tmp_path: Path) -> None:
    tamiyo = esper.Tamiyo("off", output_dir=str(tmp_path))
    trainer = Trainer(
        max_steps=4, callbacks=[Early(), tamiyo], default_root_dir=tmp_path, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="must be listed behind Tamiyo"):
        trainer.fit(Plain(), datamodule=digits())


# --- which checkpoint --------------------------------------------------------------------------------------------


def test_the_newest_good_checkpoint_is_chosen(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", max_epochs=1).fit()
    assert newest(tmp_path) == run.at("end", 10)
    damaged = run.at("end", 10)
    damaged.write_bytes(damaged.read_bytes()[:-500])
    with pytest.warns(UserWarning, match=r"passed over a checkpoint: .*end-10\.ckpt cannot be read"):
        assert newest(tmp_path) == run.at("epoch", 10)
    with pytest.warns(UserWarning, match="passed over"):
        assert chosen("auto", tmp_path) == str(run.at("epoch", 10))
    assert newest(tmp_path, without=("kept",)) is None
    assert chosen("auto", tmp_path / "empty") is None and chosen(None, tmp_path) is None
    assert chosen("a/file.ckpt", tmp_path) == "a/file.ckpt"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        chosen(tmp_path / "empty", tmp_path)


def test_a_run_from_the_configuration_goes_on_by_itself(tmp_path: Path) -> None:
    def config(folder: str, steps: int, **given: Any) -> dict[str, Any]:
        keep = {"dirpath": str(tmp_path / folder / "checkpoints"), "every_n_train_steps": 6}
        settings = {"max_steps": steps, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        settings["callbacks"] = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep}]
        network = {"class_path": "esper.models.MLP", "init_args": {"widths": [64, 8, 10]}}
        model = {"network": network, "task": {"class_path": "esper.tolaria.tasks.Classification"}, "total_steps": 20}
        return given | {
            "seed_everything": 0,
            "output_dir": str(tmp_path / folder),
            "model": {"class_path": "esper.tolaria.module.TolariaModule", "init_args": model},
            "data": {"class_path": "esper.data.Digits"},
            "tamiyo": {"policy": "off"},
            "trainer": settings | {"enable_model_summary": False},
        }

    whole = run(config("whole", 20)).grown
    run(config("cut", 13, resume="auto"))
    again = run(config("cut", 20, resume="auto")).grown
    assert again.report_samples == whole.report_samples
    assert "resume" not in (tmp_path / "cut" / "config.yaml").read_text()
