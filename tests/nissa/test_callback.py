import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

import esper
from esper.leyline.errors import ConfigError, OutputError
from esper.leyline.events import RolledBack
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


def make(
    folder: Path,
    *,
    policy: str = "schedule",
    epochs: int = 6,
    first: bool = False,
    every: int | None = None,
    more: Sequence[Callback] = (),
    **given: Any,
) -> Parts:
    tamiyo = Tamiyo(policy, kasmina=QUICK, settings=planting(), targets=["net.*"], output_dir=str(folder))
    report = GrowthReport(title="digits")
    name = "{epoch}" if every is None else "{step}"
    keep = ModelCheckpoint(dirpath=folder / "checkpoints", save_top_k=-1, filename=name, every_n_train_steps=every)
    callbacks = [report, tamiyo, keep, *more] if first else [tamiyo, report, keep, *more]
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
    assert report.chronicle.ramps == expected.ramps


class Witness(Callback):
    """Reads alpha where a forward does: in the child's own buffer."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        tamiyo = find_tamiyo(trainer)
        assert tamiyo is not None
        grafts = tamiyo.bank.grafted()
        self.seen[trainer.global_step] = {str(seed): float(graft.alpha) for seed, graft in grafts.items()}

    def check(self, report: GrowthReport) -> None:
        for ramp in report.chronicle.ramps.of.values():
            steps = [step for step, _ in ramp.points]
            assert steps == sorted(set(steps)), "each step is told once, in order"
        for step, seen in self.seen.items():
            for seed, ramp in report.chronicle.ramps.of.items():
                noted = next((alpha for at, alpha in reversed(ramp.points) if at <= step), 0.0)
                assert seen.get(seed, 0.0) == noted, (step, seed)
            assert seen.keys() <= report.chronicle.ramps.of.keys()


def test_ramps_are_the_alphas_of_every_step(finished: tuple[Path, Parts], tmp_path: Path) -> None:
    witness = Witness()
    fit, report, _ = make(tmp_path, more=[witness])
    fit.fit(Plain(), datamodule=digits())
    (ramp,) = report.chronicle.ramps.of.values()
    assert ramp.points == [(10, 0.0), (11, 0.25), (12, 0.5), (13, 0.75), (14, 1.0)]
    assert len(witness.seen) == 60
    witness.check(report)
    assert report.chronicle.ramps == finished[1][1].chronicle.ramps == read_chronicle(tmp_path).ramps


class Breaking(Plain):
    """Its loss is not a number once."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if len(self.train_losses) == self.at else loss


def test_a_child_that_a_rollback_removed_has_no_alpha_from_then_on(tmp_path: Path) -> None:
    witness = Witness()
    fit, report, _ = make(tmp_path, more=[witness])
    fit.fit(Breaking(14), datamodule=digits())
    (event,) = report.chronicle.of(RolledBack)
    assert (event.step, event.restored_step) == (14, 10), "the count of steps goes on"
    (ramp,) = report.chronicle.ramps.of.values()
    assert ramp.points == [(10, 0.0), (11, 0.25), (12, 0.5), (13, 0.75), (14, 0.0)]
    witness.check(report)


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
        assert found.ramps == expected.chronicle.ramps


@pytest.mark.parametrize("at", [11, 13])
def test_a_run_resumed_inside_a_ramp_has_the_same_ramps(finished: tuple[Path, Parts], tmp_path: Path, at: int) -> None:
    fit, _, _ = make(tmp_path, every=at)
    fit.fit(Plain(), datamodule=digits())
    checkpoint = tmp_path / "checkpoints" / f"step={at}.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["callbacks"]["GrowthReport"]["ramps"]
    (ramp,) = saved.values()
    assert 1 <= len(ramp["points"]) < 5
    resumed, report, _ = make(tmp_path / "resumed", every=at)
    resumed.fit(Plain(), datamodule=digits(), ckpt_path=checkpoint)
    assert report.chronicle.ramps == finished[1][1].chronicle.ramps


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
