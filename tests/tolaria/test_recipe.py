"""What a run found, trained from scratch by the configuration that its recipe is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import nn

import esper
from esper.cli import main
from esper.leyline.errors import CheckpointError, ConfigError
from esper.leyline.states import SeedState
from esper.run import run
from esper.tolaria.from_start import FromStart
from esper.tolaria.planted import Grown, Planted
from esper.tolaria.recipe import kept_children, recipe, write_recipe
from tests.grafts import grafted, wrapped
from tests.helpers import Plain, digits, grow, planting, trainer

ROOT = Path(__file__).parents[2]


def config(folder: Path, **changed: Any) -> dict[str, Any]:
    """A run of a second that plants one child of each of two kinds."""
    schedule = [
        {"at": 10, "blueprint": "BP-WIDEN", "site": "layers.2", "params": 115},
        {"at": 40, "blueprint": "BP-PROJ-LORA", "site": "layers.4", "params": 96},
    ]
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}}
    network = {"class_path": "esper.models.MLP", "init_args": {"widths": [64, 16, 4, 16, 16, 10]}}
    task = {"class_path": "esper.tolaria.tasks.Classification"}
    model = {"network": network, "task": task, "optimizer": optimizer}
    plain = {"policy": "schedule", "settings": planting() | {"schedule": schedule}}
    return {
        "output_dir": str(folder),
        "seed_everything": 0,
        "model": {"class_path": "esper.tolaria.module.TolariaModule", "init_args": model},
        "data": {"class_path": "esper.data.Digits", "init_args": {"batch_size": 64, "train": 640}},
        "tamiyo": plain | {"kasmina": {"stabilization_steps": 10, "ramp_steps": 4}, "targets": ["layers.[024]"]},
        "nissa": {"title": "small"},
        "trainer": {
            "max_epochs": 12,
            "logger": False,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        },
    } | changed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("found") / "run"
    run(config(folder))
    return folder


def topology(model: nn.Module) -> list[tuple[Any, ...]]:
    """What sits where: site and slot, graph, what it reads, sizes."""
    found = []
    for path, grown in model.named_modules():
        for key, site in grown.items() if isinstance(grown, Grown) else ():
            where = ".".join(filter(None, [path.rpartition(".")[0], grown.paths[key]]))
            for slot, planted in site.items():
                found.append((where, slot, planted.child.ir.id, planted.reads, planted.child.dims))
    return sorted(found, key=str)


def test_the_recipe_trains_the_same_architecture(found: Path) -> None:
    grown = esper.load_model(found / "model")
    assert len(grown.bank.grafted()) == 2
    outcome = run(recipe(found)).grown
    scratch = esper.load_model(found / "from_scratch" / "model")
    size = sum(p.numel() for p in grown.parameters())
    assert sum(p.numel() for p in scratch.parameters()) == size
    assert outcome.report_loss is not None
    plain = esper.export(grown, merge=False)
    assert topology(scratch.host) == topology(plain)
    assert [s.blueprint for s in scratch.seeds if s.blueprint] == [], "the policy is off"
    for trained in (m for m in scratch.modules() if isinstance(m, Planted)):
        last = list(trained.child.parameters())[-1]
        assert last.abs().max() > 0, "a child starts at zero and has learnt since"


def test_a_recipe_starts_where_its_host_would(found: Path) -> None:
    torch.manual_seed(0)
    first = Plain()
    before = first.net(torch.ones(1, 64))
    children = kept_children(found / "model")
    renamed = [child | {"site": {"layers.2": "net.0", "layers.4": "net.0"}[child["site"]]} for child in children]
    shapes = [child | {"shape": child["shape"] | {"d_in": 64, "d_out": 16}} for child in renamed]
    callback = FromStart(children=shapes)
    callback.setup(Trainer(logger=False, accelerator="cpu"), first, "fit")
    assert torch.equal(first.net(torch.ones(1, 64)), before), "children start without effect"


def test_the_command_writes_what_the_command_line_takes(found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = found.parent / "mine" / "again.yaml"
    assert main(["recipe", str(found), "--out", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    content = yaml.safe_load(target.read_text())
    assert content["tamiyo"]["policy"] == "off"
    children = content["trainer"]["callbacks"][0]["init_args"]["children"]
    assert [child["blueprint"] for child in children] == ["BP-WIDEN", "BP-PROJ-LORA"]
    short = ["--trainer.max_epochs", "1", "--output_dir", str(found.parent / "short")]
    assert main(["fit", "--config", str(target), *short]) == 0
    params = json.loads((found.parent / "short" / "growth.json").read_text())["params"]
    assert params["before"] == json.loads((found / "growth.json").read_text())["params"]["after"]


@pytest.mark.slow
def test_hydra_composes_the_recipe(found: Path, tmp_path: Path) -> None:
    target = write_recipe(found, tmp_path / "recipe.yaml")
    where = ["--config-path", str(tmp_path), "--config-name", target.stem]
    changed = [f"output_dir={tmp_path}/out", f"hydra.run.dir={tmp_path}/hydra", "trainer.max_epochs=1"]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "train.py"), *where, *changed],
        capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    params = json.loads((tmp_path / "out" / "growth.json").read_text())["params"]
    assert params["before"] == json.loads((found / "growth.json").read_text())["params"]["after"]


class Own(Plain):
    """A user's module whose optimizer takes what it is told to."""

    def __init__(self, *, whole: bool = True) -> None:
        super().__init__()
        self.whole = whole
        self.other = nn.Linear(1, 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((self.net if self.whole else self.net[0]).parameters(), lr=3e-3)


def test_a_users_own_module_trains_its_children_too(tmp_path: Path) -> None:
    module, callback = grow(tmp_path / "first")
    children = kept_children(esper.save_model(callback.morphable, tmp_path / "model"))
    assert [child["site"] for child in children] == ["net.2"]
    fresh = Own()
    trainer(tmp_path, None, epochs=1, callbacks=[FromStart(children=children)]).fit(fresh, datamodule=digits())
    count = sum(p.numel() for p in module.parameters()) + sum(p.numel() for p in fresh.other.parameters())
    assert sum(p.numel() for p in fresh.parameters()) == count
    assert [name for name, m in fresh.named_modules() if isinstance(m, Planted)] == ["net.grown.at_2.c0s0"]
    deaf = Own(whole=False)
    with pytest.raises(ConfigError, match="no optimizer of Own trains the children"):
        trainer(tmp_path / "deaf", None, epochs=1, callbacks=[FromStart(children=children)]).fit(
            deaf, datamodule=digits()
        )


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_recipe_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    _, callback = grow(tmp_path / "first")
    children = kept_children(esper.save_model(callback.morphable, tmp_path / "model"))

    def fit(folder: Path, epochs: int, ckpt: Any = None) -> LightningModule:
        module = Plain()
        own = trainer(folder, None, epochs=epochs)
        own.callbacks.insert(0, FromStart(children=children))  # type: ignore[attr-defined]
        own.fit(module, datamodule=digits(), ckpt_path=ckpt, weights_only=True)
        return module

    whole = fit(tmp_path / "whole", 3)
    fit(tmp_path / "part", 2)
    resumed = fit(tmp_path / "rest", 3, tmp_path / "part" / "checkpoints" / "epoch=1.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_chunks_and_graphs_of_ones_own(tmp_path: Path) -> None:
    x = torch.randn(3, 6)
    model = wrapped(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), x, chunks=2)
    graft = grafted(model, "0", "BP-MLP-GELU", chunk=1, dims={"h": 3})
    grafted(model, "0", "BP-WIDEN", chunk=0, state=SeedState.GRAFTING)
    record = next(iter(model.bank.records.values()))
    record.ir = record.ir | {"name": "BP-MY-OWN"}
    (child,) = kept_children(esper.save_model(model, tmp_path / "model"))
    assert (child["start"], child["width"], child["dims"]) == (graft.start, graft.width, {"h": 3})
    assert child["blueprint"]["name"] == "BP-MY-OWN", "a graph that the library lacks travels in the recipe"


def test_what_is_no_run_is_named(found: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.yaml"):
        recipe(tmp_path)
    (tmp_path / "config.yaml").write_text("- 1\n")
    with pytest.raises(CheckpointError, match="not the configuration of a run"):
        recipe(tmp_path)
    (tmp_path / "config.yaml").write_text((found / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match="topology.json"):
        recipe(tmp_path)
    esper.save_model(esper.wrap(nn.Sequential(nn.Linear(2, 2))), tmp_path / "model")
    with pytest.raises(ConfigError, match="kept nothing"):
        recipe(tmp_path)
    children = kept_children(found / "model")
    with pytest.raises(ConfigError, match="child 0 has unknown keys color"):
        FromStart(children=[children[0] | {"color": "red"}])
    with pytest.raises(ConfigError, match="cannot take its child"):
        FromStart(children=children).setup(Trainer(logger=False, accelerator="cpu"), Plain(), "fit")
