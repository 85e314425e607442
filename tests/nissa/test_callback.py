import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

import esper
from esper.leyline.errors import ConfigError, OutputError
from esper.leyline.states import SeedState
from esper.nissa.callback import GrowthReport, find_tamiyo
from esper.nissa.folder import read_chronicle
from esper.tamiyo.callback import Tamiyo
from tests.helpers import QUICK, Plain, digits, planting, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]
Parts = tuple[Trainer, GrowthReport, Tamiyo]


def make(folder: Path, *, policy: str = "schedule", epochs: int = 6, first: bool = False, **given: Any) -> Parts:
    tamiyo = Tamiyo(policy, kasmina=QUICK, settings=planting(), targets=["net.*"], output_dir=str(folder))
    report = GrowthReport(title="digits")
    keep = ModelCheckpoint(dirpath=folder / "checkpoints", save_top_k=-1, filename="{epoch}")
    callbacks = [report, tamiyo, keep] if first else [tamiyo, report, keep]
    return trainer(folder, None, epochs=epochs, callbacks=callbacks, **given), report, tamiyo


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parts]:
    folder = tmp_path_factory.mktemp("run")
    parts = make(folder, logger=CSVLogger(folder, name="csv"))
    parts[0].fit(Plain(), datamodule=digits())
    return folder, parts


def test_the_artifacts_tell_what_happened(finished: tuple[Path, Parts]) -> None:
    folder, (_, report, tamiyo) = finished
    growth = json.loads((folder / "growth.json").read_text())
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [graft["outcome"] for graft in growth["grafts"]] == ["FOSSILIZED"]
    graft, final = growth["grafts"][0], next(e for e in events if e.get("target") == "FOSSILIZED")
    assert (graft["seed_id"], graft["ended"], graft["reason"]) == (final["seed_id"], final["step"], final["reason"])
    assert growth["params"]["added"] == tamiyo.bank.added_parameters() > 0
    assert growth["losses"]["decision"] == [
        [step, loss] for step, loss in {e["step"]: e["validation_loss"] for e in events if "train_loss" in e}.items()
    ]
    assert len(growth["losses"]["train"]) == growth["steps"] == 60
    assert (folder / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert report.folder == folder


def test_lineage_and_model_are_written(finished: tuple[Path, Parts]) -> None:
    folder, (_, _, tamiyo) = finished
    lineage = json.loads((folder / "lineage.json").read_text())
    assert len(lineage["fossils"]) == 1 and lineage == json.loads((folder / "model" / "lineage.json").read_text())
    loaded = esper.load_model(folder / "model", Plain())
    x = torch.rand(3, 64)
    assert torch.equal(loaded.host.net(x), tamiyo.morphable.host.eval().net(x))  # type: ignore[operator, union-attr]


def test_growth_is_logged_at_boundaries(finished: tuple[Path, Parts]) -> None:
    folder, (_, report, _) = finished
    rows = (folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    at = names.index("esper/added_params")
    logged = [float(row.split(",")[at]) for row in rows[1:] if row.split(",")[at]]
    added = [number for _, number in report.chronicle.added_params_over_time]
    assert logged == [*added, added[-1]] and added[-1] > 0
    assert {f"esper/seeds_{s.lower()}" for s in SeedState if s != "DORMANT"} | {"esper/decision_loss"} <= set(names)


def test_the_order_of_the_callbacks_does_not_matter(finished: tuple[Path, Parts], tmp_path: Path) -> None:
    fit, report, _ = make(tmp_path, first=True)
    fit.fit(Plain(), datamodule=digits())
    expected = finished[1][1].chronicle
    assert [life.stages for life in report.chronicle.lives()] == [life.stages for life in expected.lives()]
    assert report.chronicle.decision_losses == expected.decision_losses


class Silent(Plain):
    """Returns its validation loss and logs nothing, so that somebody has to measure it."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [Plain, Silent])
def test_watching_changes_nothing(tmp_path: Path, kind: type[Plain]) -> None:
    watched, bare = kind(), kind()
    fit, report, _ = make(tmp_path / "a", policy="off", epochs=2)
    fit.fit(watched, datamodule=digits())
    trainer(tmp_path / "b", None, epochs=2).fit(bare, datamodule=digits())
    assert watched.train_losses == bare.train_losses
    assert [step for step, _ in report.chronicle.decision_losses] == [10, 20]


def test_a_run_without_validation_has_no_decision_losses(tmp_path: Path) -> None:
    fit, report, _ = make(tmp_path, policy="off", epochs=1, limit_val_batches=0)
    fit.fit(Plain(), datamodule=digits())
    assert report.chronicle.decision_losses == [] and (tmp_path / "growth.png").exists()


def test_the_twin_has_decision_losses_too(finished: tuple[Path, Parts], tmp_path: Path) -> None:
    fit, twin, _ = make(tmp_path, policy="off")
    fit.fit(Plain(), datamodule=digits())
    grown = finished[1][1]
    assert [step for step, _ in twin.chronicle.decision_losses] == [s for s, _ in grown.chronicle.decision_losses]
    assert twin.chronicle.decision_losses[0] == grown.chronicle.decision_losses[0]
    assert grown.draw(twin.chronicle).stat().st_size > 10_000
    assert read_chronicle(tmp_path).decision_losses == twin.chronicle.decision_losses


@pytest.mark.parametrize("knows", [True, False])
def test_a_resumed_run_tells_its_whole_story(finished: tuple[Path, Parts], tmp_path: Path, knows: bool) -> None:
    whole, (_, expected, _) = finished
    fit, _, _ = make(tmp_path, epochs=3)
    fit.fit(Plain(), datamodule=digits())
    checkpoint = torch.load(tmp_path / "checkpoints" / "epoch=2.ckpt", weights_only=True)
    if not knows:
        checkpoint["callbacks"].pop("GrowthReport")
    torch.save(checkpoint, tmp_path / "resume.ckpt")
    resumed, report, _ = make(tmp_path)
    resumed.fit(Plain(), datamodule=digits(), ckpt_path=tmp_path / "resume.ckpt")
    found = report.chronicle
    assert [life.stages for life in found.lives()] == [life.stages for life in expected.chronicle.lives()]
    assert found.decision_losses == expected.chronicle.decision_losses
    assert found.added_params_over_time == expected.chronicle.added_params_over_time
    if knows:
        assert found.curve == expected.chronicle.curve


def test_a_trainer_without_tamiyo_is_refused(tmp_path: Path) -> None:
    fit = trainer(tmp_path, None, callbacks=[GrowthReport()], enable_checkpointing=False)
    with pytest.raises(ConfigError, match="add esper.Tamiyo"):
        fit.fit(Plain(), datamodule=digits())
    assert find_tamiyo(fit) is None


def test_an_unwritable_folder_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module = Plain()
    report = GrowthReport(output_dir=str(tmp_path / "file" / "run"))
    tamiyo = Tamiyo("off", output_dir=str(tmp_path))
    fit = trainer(tmp_path, None, callbacks=[tamiyo, report], enable_checkpointing=False)
    with pytest.raises(OutputError, match="choose another output folder"):
        fit.fit(module, datamodule=digits())
    assert module.train_losses == []


def test_before_a_fit_there_is_no_folder() -> None:
    with pytest.raises(ConfigError, match="chosen when the fit starts"):
        GrowthReport().folder  # noqa: B018 - raises


def test_an_interrupted_run_lets_go(tmp_path: Path) -> None:
    class Broken(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("broken on purpose")

    fit, _, tamiyo = make(tmp_path)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit.fit(Broken(), datamodule=digits())
    assert tamiyo.controller is not None
    assert len(tamiyo.controller.listeners) == 1
