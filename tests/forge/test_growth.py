"""A run whose graft is a compiled kernel: the same growth, the same model in the end, and a resume to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import esper
from esper.blueprints.dims import resolve_dims
from esper.kasmina.compiled import CompiledChild
from esper.run import run
from tests.forge.test_store import World
from tests.helpers import QUICK, planting
from tests.kernels import SITE, compiled, spec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
PARAMS = 2 * SITE.d_in * spec().dims["h"] + spec().dims["h"] + SITE.d_out
EPOCHS, STEPS = 3, 200
TOKENS = torch.arange(2 * SITE.tokens).view(2, SITE.tokens)


def config(folder: Path, forge: Path | None, **more: Any) -> dict[str, Any]:
    """A byte-level model of one block, too narrow, which grows one child behind it."""
    network = {"d_model": SITE.d_in, "layers": 1, "heads": 2, "ffn": 2, "context": SITE.tokens, "vocab": 256}
    data = {"context": SITE.tokens, "batch_size": 16, "steps_per_epoch": STEPS, "decision_windows": 256}
    keep = {"dirpath": str(folder / "kept"), "save_top_k": -1, "filename": "{epoch}"}
    trainer: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": EPOCHS,
        "logger": {"class_path": "esper.nissa.loggers.csv_logger", "init_args": {"save_dir": str(folder)}},
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep}],
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return {
        "seed_everything": 0,
        "threads": 1,
        "output_dir": str(folder),
        "model": {
            "class_path": "esper.tolaria.module.TolariaModule",
            "init_args": {
                "network": {"class_path": "esper.models.ByteLM", "init_args": network},
                "task": {"class_path": "esper.tolaria.tasks.LanguageModeling"},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {"class_path": "esper.data.ByteText", "init_args": data | {"report_windows": 16}},
        "tamiyo": {
            "policy": "schedule",
            "targets": ["*.after_ffn"],
            "kasmina": QUICK,
            "settings": planting(site="blocks.0.after_ffn", params=PARAMS) | {"decision_samples": 256},
        },
        # No workers: everything this run may use is there, and a job at work beside it proves nothing here.
        "forge": {"enabled": forge is not None, "root": str(forge or folder), "tezzeret": 0, "urabrask": 0},
        "trainer": trainer,
        **more,
    }


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a forge that has validated the kernel, and its id."""
    world = World(folder := tmp_path_factory.mktemp("forge"))
    kernel_id = world.promote(compiled(tmp_path_factory)[0])
    world.close()
    return folder, kernel_id


def kernels_of(folder: Path) -> list[str]:
    reports = (folder / "fieldreports.jsonl").read_text().splitlines()
    return [json.loads(line)["kernel_artifact_id"] for line in reports]


def test_the_size_is_the_one_that_was_compiled() -> None:
    assert resolve_dims(esper.blueprints.load_library()["BP-MLP-GELU"].ir, SITE, {})["h"] == spec().dims["h"]


def test_it_grows_as_it_would_eagerly_and_resumes_bit_for_bit(forge: tuple[Path, str], tmp_path: Path) -> None:
    root, kernel_id = forge
    grown = run(config(tmp_path / "compiled", root)).grown
    assert [(graft.kernel, graft.outcome) for graft in grown.grafts] == [("compiled", "FOSSILIZED")]
    assert kernels_of(tmp_path / "compiled") == [kernel_id]

    eager = run(config(tmp_path / "eager", None)).grown
    assert [(graft.kernel, graft.outcome) for graft in eager.grafts] == [("eager", "FOSSILIZED")]
    assert grown.report_samples == pytest.approx(eager.report_samples, rel=1e-4)

    saved, other = (esper.load_model(tmp_path / name / "model") for name in ("compiled", "eager"))
    with torch.no_grad():
        torch.testing.assert_close(saved(TOKENS), other(TOKENS), rtol=1e-3, atol=1e-3)
    assert not any(isinstance(module, CompiledChild) for module in saved.modules())

    # From a checkpoint with the child at work, in another folder.
    point = tmp_path / "compiled" / "kept" / "epoch=1.ckpt"
    resumed = run(config(tmp_path / "resumed", root, ckpt_path=str(point))).grown
    assert resumed.report_samples == grown.report_samples
