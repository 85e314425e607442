"""`esper fit` with two devices, whose processes Lightning's own launcher starts."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

import esper
from esper.tolaria.exchange import bit_sum
from tests.distributed.launch import ROOT, free_port

pytestmark = pytest.mark.slow


class Told(Callback):
    """Writes after every epoch, on every rank, what must be the same on all."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tamiyo = next(c for c in trainer.callbacks if isinstance(c, esper.Tamiyo))
        found = {
            "epoch": trainer.current_epoch,
            "weights": bit_sum(pl_module.parameters()),
            "topology": tamiyo.bank.topology(),
            "moments": bit_sum(v for state in trainer.optimizers[0].state.values() for v in state.values()),
        }
        with (Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")


def config(folder: Path) -> dict[str, Any]:
    keep = {"dirpath": str(folder / "checkpoints"), "save_top_k": -1, "filename": "{epoch}"}
    return {
        "output_dir": str(folder),
        "threads": 1,
        "model": {
            "class_path": "TolariaModule",
            "init_args": {
                "network": {"class_path": "esper.models.MLP", "init_args": {"widths": [64, 16, 10]}},
                "task": {"class_path": "esper.tolaria.tasks.Classification"},
            },
        },
        "data": {"class_path": "Digits", "init_args": {"batch_size": 32, "train": 640}},
        "tamiyo": {
            "policy": "schedule",
            "kasmina": {"ramp_steps": 4, "stabilization_steps": 10},
            "settings": {"schedule": [{"at": 3, "blueprint": "BP-MLP-GELU", "params": 2000}], "budget": 5000},
        },
        "trainer": {
            "accelerator": "cpu",
            "strategy": "ddp",
            "devices": 2,
            "max_epochs": 3,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep},
                {"class_path": "tests.distributed.test_launched.Told"},
            ],
        },
    }


def test_a_run_from_the_command_line_starts_its_ranks_and_writes_once(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config(tmp_path / "run")))
    place = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(
        [str(Path(sys.executable).parent / "esper"), "fit", "--config", "run.yaml"],
        cwd=tmp_path,
        env=os.environ | place,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("What it came to") == 1
    check_ranks(tmp_path / "run")
    check_files(tmp_path / "run")


def check_ranks(run: Path) -> None:
    """Both ranks have trained, and hold the same after every epoch."""
    one, other = ((run / f"rank{rank}.jsonl").read_text().splitlines() for rank in range(2))
    assert one == other and [json.loads(line)["epoch"] for line in one] == [0, 1, 2]
    assert json.loads(one[-1])["topology"]


def check_files(run: Path) -> None:
    """Everything is there, and was written by one rank."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    changes = Counter((e["seed_id"], e["source"], e["target"]) for e in events if e["type"] == "SeedTransitioned")
    assert set(changes.values()) == {1} and ("GRAFTING" in {target for _, _, target in changes})
    ends = [e for e in events if e["type"] == "SeedTransitioned" and e["target"] in ("FOSSILIZED", "CULLED")]
    assert len((run / "fieldreports.jsonl").read_text().splitlines()) == len(ends) == 1
    assert (run / "growth.png").exists() and (run / "config.yaml").exists()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"epoch={epoch}.ckpt" for epoch in range(3)}
    saved = torch.load(run / "checkpoints" / "epoch=2.ckpt", weights_only=True)
    assert len(saved["esper"]["ranks"]) == 2
