"""A grown model saved, and loaded in a process that never saw it grow."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import esper
from esper.data import Digits
from esper.leyline.errors import CheckpointError, ConfigError, OutputError
from esper.leyline.events import Fault
from esper.models import MLP
from esper.tolaria.saved import signature
from tests.helpers import QUICK, planting


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> esper.MorphableModel:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = esper.wrap(MLP(widths=(64, 16, 10)), QUICK)
    settings = planting(site="layers.0", params=600) | {"policy": "schedule"}
    controller = esper.TamiyoController(model, settings)
    config = {"max_epochs": 6, "output_dir": str(folder), "accelerator": "cpu"}
    trained, history = esper.TolariaTrainer(model, controller, config, data=Digits(batch_size=64, train=640)).train()
    controller.close()
    assert "report_loss" in history[-1]
    assert trained.bank.grafted()
    return trained.eval()


def test_a_fresh_process_gives_the_same_outputs(grown: esper.MorphableModel, tmp_path: Path) -> None:
    esper.save_model(grown, tmp_path / "model")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    torch.save({"x": x, "y": grown(x).detach()}, tmp_path / "expected.pt")
    code = (
        "import sys, torch, esper; e = torch.load(sys.argv[2], weights_only=True);"
        "m = esper.load_model(sys.argv[1]); assert torch.equal(m(e['x']), e['y']); print('same')"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model"), str(tmp_path / "expected.pt")],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert result.stdout.strip() == "same", result.stderr


def test_a_foreign_host_is_given_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))).eval()
    esper.save_model(model, tmp_path / "model")
    fresh = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    loaded = esper.load_model(tmp_path / "model", host=fresh)
    x = torch.randn(2, 3)
    assert loaded.host is fresh
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(CheckpointError, match=r"esper.load_model\(FOLDER, host="):
        esper.load_model(tmp_path / "model")


def test_weights_may_be_read_by_whoever_may_read_the_rest(grown: esper.MorphableModel, tmp_path: Path) -> None:
    folder = esper.save_model(grown, tmp_path / "model")
    assert len({file.stat().st_mode for file in folder.iterdir() if file.is_file()}) == 1


def test_lineage_names_the_evidence(grown: esper.MorphableModel, tmp_path: Path) -> None:
    esper.save_model(grown, tmp_path / "model")
    lineage = json.loads((tmp_path / "model" / "lineage.json").read_text())
    fossil = lineage["fossils"][0]
    assert lineage["added_params"] == grown.bank.added_parameters()
    assert fossil["counterfactual"]["lower"] > 0
    assert (tmp_path / "model" / "blueprints" / f"{fossil['blueprint_sha256']}.json").exists()


def test_the_card_tells_what_grew(grown: esper.MorphableModel, tmp_path: Path) -> None:
    card = (esper.save_model(grown, tmp_path / "model") / "README.md").read_text()
    lineage = json.loads((tmp_path / "model" / "lineage.json").read_text())
    fossil = lineage["fossils"][0]
    assert f"{lineage['host_params']:,} parameters of the host and {lineage['added_params']:,} grown" in card
    assert f"| `{fossil['seed_id']}` | {fossil['blueprint']} |" in card
    assert f"{fossil['counterfactual']['mean']:.4g} ({fossil['counterfactual']['lower']:.4g} to" in card
    code = card.split("```python")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "model"))
    names: dict[str, Any] = {}
    exec(code, names)
    x = torch.randn(5, 64)
    assert torch.equal(names["plain"](x), grown(x))


def test_the_card_of_a_foreign_host_says_so(tmp_path: Path) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 4)))
    card = (esper.save_model(model, tmp_path / "model") / "README.md").read_text()
    assert "host=fresh" in card
    assert "Nothing was kept" in card


DATA = Path(__file__).parent / "data"


def test_a_folder_of_the_first_format_loads(tmp_path: Path) -> None:
    expected = load_file(DATA / "format-1-model-outputs.safetensors")
    loaded = esper.load_model(DATA / "format-1-model", host=MLP(widths=(3, 5, 4, 2)))
    assert [seed.blueprint for seed in loaded.seeds if seed.blueprint] == ["BP-MLP-GELU", "BP-PROJ-LORA"]
    # Another processor rounds products in another order.
    torch.testing.assert_close(loaded(expected["x"]), expected["y"])
    again = esper.load_model(esper.save_model(loaded, tmp_path / "model"))
    assert torch.equal(again(expected["x"]), loaded(expected["x"]))
    assert json.loads((tmp_path / "model" / "topology.json").read_text())["format"] == 2


@pytest.mark.parametrize("found", [0, 3, "2", None])
def test_an_unknown_format_is_refused(found: Any, grown: esper.MorphableModel, tmp_path: Path) -> None:
    path = esper.save_model(grown, tmp_path / "model")
    rewrite(path, json.loads((path / "topology.json").read_text()) | {"format": found})
    with pytest.raises(CheckpointError, match="another format than 1 to 2"):
        esper.load_model(path)


def test_a_folder_of_other_things_is_not_replaced(grown: esper.MorphableModel, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(OutputError, match="something else"):
        esper.save_model(grown, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_saving_twice_replaces_the_folder_as_a_whole(grown: esper.MorphableModel, tmp_path: Path) -> None:
    esper.save_model(grown, tmp_path / "model")
    (tmp_path / "model" / "stale").write_text("x")
    esper.save_model(grown, tmp_path / "model")
    assert not (tmp_path / "model" / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_every_damage_is_named(grown: esper.MorphableModel, tmp_path: Path) -> None:
    path = esper.save_model(grown, tmp_path / "model")
    weights = path / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged"):
        esper.load_model(path)
    with pytest.raises(CheckpointError, match="topology.json"):
        esper.load_model(tmp_path)
    (path / "topology.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        esper.load_model(path)


def test_another_architecture_is_refused(grown: esper.MorphableModel, tmp_path: Path) -> None:
    path = esper.save_model(grown, tmp_path / "model")
    with pytest.raises(CheckpointError):
        esper.load_model(path, host=nn.Sequential(nn.Linear(64, 16)))
    with pytest.raises(CheckpointError, match="shape|match"):
        esper.load_model(path, host=MLP(widths=(64, 12, 10)))


def test_only_esper_models_are_rebuilt_by_name(grown: esper.MorphableModel, tmp_path: Path) -> None:
    path = esper.save_model(grown, tmp_path / "model")
    topology = json.loads((path / "topology.json").read_text())
    topology["host"] = {"class": "os.system", "arguments": {"command": "true"}}
    rewrite(path, topology)
    with pytest.raises(CheckpointError, match="not imported"):
        esper.load_model(path)


def rewrite(path: Path, topology: dict[str, Any]) -> None:
    """Write a topology whose own digest is right, as a bug or a forger might."""
    (path / "topology.json").write_text(json.dumps(topology | {"sha256": signature(topology)}))


def test_a_changed_alpha_is_found(grown: esper.MorphableModel, tmp_path: Path) -> None:
    file = esper.save_model(grown, tmp_path / "model") / "topology.json"
    topology = json.loads(file.read_text())
    file.write_text(json.dumps(topology))  # other spacing, same content
    esper.load_model(file.parent)
    topology["seeds"][0]["alpha"] = 0.5
    file.write_text(json.dumps(topology))
    with pytest.raises(CheckpointError, match="not what was saved"):
        esper.load_model(file.parent)


MLP_CLASS = "esper.models.mlp.MLP"
WRONG: dict[str, dict[str, Any]] = {
    "no sites": {"sites": None},
    "sites of another type": {"sites": [[1]]},
    "seeds of another type": {"seeds": 3},
    "seeds without fields": {"seeds": [{}]},
    "settings of another type": {"kasmina": 3},
    "unknown settings": {"kasmina": {"color": "red"}},
    "no digest of the weights": {"weights_sha256": None},
    "a host without arguments": {"host": {"class": MLP_CLASS}},
    "a host that is a list": {"host": [MLP_CLASS]},
    "a host with other arguments": {"host": {"class": MLP_CLASS, "arguments": {"depth": 3}}},
    "a host with impossible arguments": {"host": {"class": MLP_CLASS, "arguments": {"widths": ["a", None]}}},
    "a host of no known class": {"host": {"class": "esper.models.mlp.Nothing", "arguments": {}}},
    "a host of no known module": {"host": {"class": "esper.models.nothing.MLP", "arguments": {}}},
    "a host that is no model": {"host": {"class": "esper.models.mlp.Tensor", "arguments": {}}},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_topology_that_makes_no_sense_gives_one_kind_of_error(
    what: str, grown: esper.MorphableModel, tmp_path: Path
) -> None:
    path = esper.save_model(grown, tmp_path / "model")
    topology = json.loads((path / "topology.json").read_text())
    for changed in (topology | WRONG[what], {k: v for k, v in topology.items() if k not in WRONG[what]}):
        rewrite(path, changed)
        with pytest.raises(CheckpointError):
            esper.load_model(path)


def test_a_fossil_that_was_bypassed_stays_so(grown: esper.MorphableModel, tmp_path: Path) -> None:
    broken = copy.deepcopy(grown)
    (seed,) = broken.bank.grafted()
    graft = broken.bank.graft(seed)
    assert graft is not None
    graft.fail(Fault.RAISED, "it raised")
    path = esper.save_model(broken, tmp_path / "model")
    assert json.loads((path / "lineage.json").read_text())["fossils"][0]["fault"] == "it raised"
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(esper.load_model(path)(x), broken(x))
    assert not torch.equal(broken(x), grown(x))


def test_what_cannot_be_saved_says_so(grown: esper.MorphableModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="carries no seeds"):
        esper.save_model(nn.Linear(1, 1), tmp_path / "model")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="writable"):
        esper.save_model(grown, tmp_path / "file" / "model")
