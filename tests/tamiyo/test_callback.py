"""The two-line adoption: an unmodified LightningModule grows, checkpoints and resumes."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos import Transformer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.demos.transformer import LightningTransformer
from torch.utils.data import DataLoader, Dataset

import esper
from esper.leyline.errors import ConfigError, DataError, OutputError
from esper.leyline.states import SeedState
from tests.helpers import QUICK, Plain, digits, grow, planting, states, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
SCHEDULERS = ["none", "cosine", "onecycle", "lambda", "restarts", "sequential"]


def test_a_plain_module_grows_and_keeps_what_helps(tmp_path: Path) -> None:
    module, callback = grow(tmp_path)
    assert states(callback) == ["FOSSILIZED"]
    assert any("esper" in name for name, _ in module.named_parameters())
    groups = callback.controller.reports
    assert groups[0].counterfactual is not None and groups[0].counterfactual.lower > 0


def test_every_ended_life_has_one_field_report_on_disk(tmp_path: Path) -> None:
    _, callback = grow(tmp_path)
    lines = (tmp_path / "fieldreports.jsonl").read_text().splitlines()
    assert [json.loads(line)["outcome"] for line in lines] == [r.outcome.value for r in callback.controller.reports]


def test_a_run_keeps_an_account_of_its_work(tmp_path: Path) -> None:
    host, per_epoch = 64 * 16 + 16 * 8 + 8 * 10, 640
    _, callback = grow(tmp_path / "grown")
    total, judged, before = 0.0, 0.0, {"added_macs": 0.0, "decision_samples": 0.0, "step": 0.0}
    for entry in callback.history:
        width = host + before["added_macs"]
        passes = (entry["decision_samples"] - before["decision_samples"]) * width
        trained = per_epoch if entry["step"] > before["step"] else 0
        total, judged, before = total + 3 * trained * width + passes, judged + passes, entry
        assert entry["macs"] == total
    grown = callback.history[-1]
    assert judged > 0 and grown["added_macs"] > 0
    on_trial = grown["search_macs"] - judged
    assert on_trial > 0 and on_trial % (3 * per_epoch * grown["added_macs"]) == 0  # whole epochs of the one child

    off = esper.Tamiyo("off", targets=["net.*"])
    trainer(tmp_path / "off", off).fit(Plain(), datamodule=digits())
    assert (off.history[-1]["macs"], off.history[-1]["search_macs"]) == (3 * per_epoch * 8 * host, 0.0)


def test_the_host_walks_the_same_way_as_without_growth_until_the_first_graft(tmp_path: Path) -> None:
    settings = {"budget": 3000, "proxy": 200, "start": 50, "overhead": 5.0}
    grown, plain = Plain(), Plain()
    callback = esper.Tamiyo("heuristic", kasmina=QUICK, settings=settings, targets=["net.*"])
    trainer(tmp_path / "grown", callback).fit(grown, datamodule=digits())
    trainer(tmp_path / "off", esper.Tamiyo("off", targets=["net.*"])).fit(plain, datamodule=digits())
    assert grown.train_losses[:50] == plain.train_losses[:50]
    assert grown.train_losses[60:] != plain.train_losses[60:]


def test_what_is_spread_stays_to_be_judged_at_the_end_and_is_no_search(tmp_path: Path) -> None:
    settings = {"budget": 3000, "proxy": 200, "start": 20, "overhead": 5.0, "standout": 1e6, "price_per_kparam": 0.0}
    callback = esper.Tamiyo("heuristic", kasmina=QUICK, settings=settings, targets=["net.*"])
    trainer(tmp_path, callback).fit(Plain(), datamodule=digits())
    spread = [r for r in callback.controller.reports if r.group.startswith("spread-")]
    assert len(spread) > 1 and all(r.blueprint_id == "BP-WIDEN" and r.counterfactual is not None for r in spread)
    assert len({(r.outcome, r.counterfactual) for r in spread}) == 1, "they are judged as one"
    ends = {r.stage_steps[SeedState.GRAFTING] + r.stage_steps[SeedState.STABILIZATION] for r in spread}
    spans = list(pairwise(callback.history[:-1]))
    standing = [(before, after) for before, after in spans if after["step"] > callback.history[-1]["step"] - max(ends)]
    assert len(ends) == 1 and len(standing) > 2, "they stood longer than a proxy's stage, to the end"
    assert all(before["search_macs"] == after["search_macs"] for before, after in standing)


def frozen(*names: str) -> Plain:
    module = Plain()
    for name in names:
        module.get_submodule(name).requires_grad_(False)
    return module


def test_a_frozen_body_grows_while_its_head_trains(tmp_path: Path) -> None:
    module = frozen("net.0", "net.2")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    settings = {"budget": 3000, "proxy": 300, "start": 10, "overhead": 5.0}
    callback = esper.Tamiyo("heuristic", kasmina=QUICK, settings=settings, targets=["net.0", "net.2"])
    trainer(tmp_path, callback).fit(module, datamodule=digits())
    assert "FOSSILIZED" in states(callback)
    for name, value in before.items():
        assert torch.equal(module.state_dict()[name], value) is name.startswith(("net.0", "net.2")), name


def test_a_host_of_which_nothing_trains_is_refused(tmp_path: Path) -> None:
    callback = esper.Tamiyo("heuristic", targets=["net.*"])
    with pytest.raises(ConfigError, match="leave at least one trainable"):
        trainer(tmp_path, callback).fit(frozen("net"), datamodule=digits())


def test_what_earlier_runs_found_shrinks_the_menu_and_survives_a_resume(tmp_path: Path) -> None:
    def run(folder: str, experience: str | None, ckpt: Path | None = None) -> esper.Tamiyo:
        settings = {"budget": 3000, "proxy": 200, "start": 20, "overhead": 5.0, "experience": experience}
        callback = esper.Tamiyo("heuristic", kasmina=QUICK, settings=settings, targets=["net.*"])
        trainer(tmp_path / folder, callback).fit(Plain(), datamodule=digits(), ckpt_path=ckpt)
        return callback

    def tried(callback: esper.Tamiyo) -> list[str]:
        return [r.blueprint_id for r in callback.controller.reports if r.group == "trial-0"]

    first = run("runs/first", None)
    second = run("second", str(tmp_path / "runs"))
    assert set(tried(second)) < set(tried(first))
    assert "kinds left out by what earlier runs found" in "".join(second.controller.explanations)
    (tmp_path / "runs" / "first" / "fieldreports.jsonl").write_text("")  # what it believed is in its checkpoint
    third = run("third", str(tmp_path / "runs"), tmp_path / "second" / "checkpoints" / "epoch=0.ckpt")
    assert third.controller.explanations == second.controller.explanations


def test_events_tell_every_transition_in_order(tmp_path: Path) -> None:
    grow(tmp_path)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    path = [e["target"] for e in events if e["type"] == "SeedTransitioned"]
    assert path == [
        "GERMINATED", "LOADING", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED",
    ]  # fmt: skip


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_resume_from_an_epoch_end_gives_the_losses_of_the_uninterrupted_run(tmp_path: Path, scheduler: str) -> None:
    def run(folder: Path, ckpt: Path | None = None) -> tuple[Plain, esper.Tamiyo]:
        module = Plain(scheduler)
        callback = esper.Tamiyo("schedule", kasmina=QUICK, settings=planting(), targets=["net.*"])
        trainer(folder, callback).fit(module, datamodule=digits(), ckpt_path=ckpt)
        return module, callback

    whole, first = run(tmp_path / "whole")
    for epoch in (0, 1, 2, 5):  # before growth, loading, grafting, fossilized
        part, second = run(tmp_path / f"part{epoch}", tmp_path / "whole" / "checkpoints" / f"epoch={epoch}.ckpt")
        assert part.train_losses == whole.train_losses[10 * (epoch + 1) :]
        assert states(first) == states(second)
        for (name, a), (_, b) in zip(whole.state_dict().items(), part.state_dict().items(), strict=True):
            assert torch.equal(a, b), name
        assert [r.model_dump() for r in first.controller.reports] == [r.model_dump() for r in second.controller.reports]


def test_a_module_that_grew_in_a_trainer_is_saved_and_loaded(tmp_path: Path) -> None:
    module, _ = grow(tmp_path)
    esper.save_model(module, tmp_path / "model")
    loaded = esper.load_model(tmp_path / "model", host=Plain())
    x = torch.rand(3, 64)
    module.eval()
    assert torch.equal(loaded.host.net(x), module.net(x))  # type: ignore[union-attr,operator]
    checkpoint = tmp_path / "checkpoints" / "epoch=7.ckpt"
    with pytest.raises(esper.EsperError, match="is a file"):
        esper.load_model(checkpoint, host=Plain())


def test_the_last_decision_loss_is_that_of_what_stays(tmp_path: Path) -> None:
    settings = planting(at=60, params=2000) | {"price_per_kparam": 100.0}
    callback = esper.Tamiyo("schedule", kasmina=QUICK, settings=settings, targets=["net.*"])
    module = Plain()
    quiet = trainer(tmp_path, callback)
    quiet.fit(module, datamodule=digits())
    assert callback.controller.summary() == "kept none of 1 adaptations tried; the model is as it was."
    found = quiet.validate(module, datamodule=digits(), verbose=False)
    assert callback.history[-1]["decision_loss"] == pytest.approx(found[0]["val_loss"], rel=1e-5)


def test_a_checkpoint_holds_plain_data_only(tmp_path: Path) -> None:
    grow(tmp_path)
    checkpoint = torch.load(tmp_path / "checkpoints" / "epoch=7.ckpt", weights_only=True)
    assert checkpoint["esper"]["topology"][0]["state"] == "FOSSILIZED"


def test_a_grown_checkpoint_does_not_load_silently_without_the_callback(tmp_path: Path) -> None:
    grow(tmp_path)
    with pytest.raises(RuntimeError, match="esper"):
        trainer(tmp_path, None).fit(Plain(), datamodule=digits(), ckpt_path=tmp_path / "checkpoints" / "epoch=7.ckpt")


def test_a_grown_checkpoint_can_be_evaluated(tmp_path: Path) -> None:
    module, callback = grow(tmp_path)
    fresh = Plain()
    again = esper.Tamiyo("off", targets=["net.*"], kasmina=QUICK)
    quiet = trainer(tmp_path / "eval", again)
    found = quiet.validate(
        fresh, datamodule=digits(), ckpt_path=tmp_path / "checkpoints" / "epoch=7.ckpt", verbose=False
    )
    assert torch.equal(module.state_dict()["net.0.weight"], fresh.state_dict()["net.0.weight"])
    assert found[0]["val_loss"] == pytest.approx(callback.history[-1]["decision_loss"], rel=1e-5)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    grow(tmp_path)
    path = tmp_path / "checkpoints" / "epoch=7.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["esper.topology"] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    torch.save(content, path)
    callback = esper.Tamiyo("schedule", kasmina=QUICK, settings=planting(), targets=["net.*"])
    with pytest.raises(esper.EsperError, match="topology"):
        trainer(tmp_path, callback).fit(Plain(), datamodule=digits(), ckpt_path=path)


def test_dormant_training_is_bit_identical_to_training_without_the_callback(tmp_path: Path) -> None:
    bare, wrapped = Plain("cosine"), Plain("cosine")
    trainer(tmp_path / "a", None, gradient_clip_val=0.5).fit(bare, datamodule=digits())
    trainer(tmp_path / "b", esper.Tamiyo("off"), gradient_clip_val=0.5).fit(wrapped, datamodule=digits())
    assert bare.train_losses == wrapped.train_losses
    assert bare.state_dict().keys() == wrapped.state_dict().keys()


def test_an_alpha_zero_graft_leaves_clipped_host_training_bit_identical(tmp_path: Path) -> None:
    kasmina = {"training_steps": 10_000, "training_objective": "shadow"}
    runs = []
    for policy in ("off", "schedule"):
        module = Plain()
        callback = esper.Tamiyo(policy, kasmina=kasmina, settings=planting(), targets=["net.*"])
        trainer(tmp_path / policy, callback, gradient_clip_val=0.1, epochs=4).fit(module, datamodule=digits())
        runs.append(module.train_losses)
    assert runs[0] == runs[1]


def test_a_demo_module_of_lightning_grows_unmodified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Text(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            words = torch.arange(index, index + 13) % 17
            return words[:-1], words[1:]

    # Its `prepare_data` fetches a corpus that the loaders below replace.
    monkeypatch.setattr("lightning.pytorch.demos.transformer.WikiText2", lambda **_: None)
    torch.manual_seed(0)
    module = LightningTransformer(vocab_size=17)
    module.model = Transformer(vocab_size=17, ninp=16, nhead=2, nhid=16, nlayers=1)
    decision = DataLoader(Text(), batch_size=8)
    settings = planting(at=8, blueprint="BP-MLP-GELU", site="model.transformer.encoder.layers.0.linear2", params=900)
    callback = esper.Tamiyo("schedule", kasmina=QUICK, settings=settings, decision_loader=decision)
    trainer(tmp_path, callback, epochs=6).fit(module, DataLoader(Text(), batch_size=8))
    (report,) = callback.controller.reports
    assert report.counterfactual is not None
    assert report.reason.value in ("GATE_PASSED", "GATE_FAILED")


def test_without_validation_batches_growth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="decision part is missing"):
        trainer(tmp_path, esper.Tamiyo(), limit_val_batches=0).fit(Plain(), datamodule=digits())


def test_an_unwritable_folder_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    callback = esper.Tamiyo(output_dir=str(tmp_path / "file" / "run"))
    module = Plain()
    with pytest.raises(OutputError, match="choose another output folder"):
        trainer(tmp_path, callback).fit(module, datamodule=digits())
    assert module.train_losses == []


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    module = Plain()
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="automatic"):
        trainer(tmp_path, esper.Tamiyo()).fit(module, datamodule=digits())


def test_the_policy_is_given_once() -> None:
    with pytest.raises(ConfigError, match="Tamiyo\\(policy=...\\)"):
        esper.Tamiyo(settings={"policy": "off"})


def test_an_unknown_policy_names_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="heuristic"):
        esper.Tamiyo("heuristics")


def test_a_model_too_small_for_the_menu_is_left_alone_and_told_so(tmp_path: Path) -> None:
    callback = esper.Tamiyo()
    quiet = Trainer(
        callbacks=[callback], max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    quiet.fit(BoringModel())
    assert states(callback) == []
    assert callback.controller.explanations == ["no blueprint of the menu fits within the budget"]
