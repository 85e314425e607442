"""The training run in which stalls are looked for: a small language model, grafts all along, times of every step.

`python -m esper.bench.speed.training FOLDER` reads `job.json` there and writes `steps.json` beside it.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lightning.pytorch import Callback, LightningModule, Trainer

from esper.bench.rows import JOB_FILE, write
from esper.console import plain_errors
from esper.kasmina.forge_store import ForgeStore
from esper.run import EsperCLI
from esper.tamiyo.callback import Tamiyo

STEPS_FILE: Final = "steps.json"

_KINDS: Final = ("BP-CONV-CAUSAL", "BP-MLP-GELU")
_EVERY: Final = 25
"""Training steps between two boundaries; a graft takes two or three of them."""

_OF_A_GRAFT: Final = 3


def config(folder: Path, forge: Path, steps: int) -> dict[str, Any]:
    """Return the run as `esper fit` takes it: every child is culled, so that the net stays as it is between grafts."""
    settings = {"schedule": _plantings(steps), "budget": 1_000_000, "min_effect": 1000.0, "menu": list(_KINDS)}
    seeds = {"ramp_steps": 5, "stabilization_steps": 5, "embargo_steps": 0}
    limits = {"limit_val_batches": 1, "limit_test_batches": 1, "val_check_interval": _EVERY}
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    times = {"class_path": f"{__name__}.StepTimes", "init_args": {"folder": str(folder)}}
    return {
        "seed_everything": 0,
        "threads": 1,
        "output_dir": str(folder / "run"),
        "model": {
            "class_path": "esper.tolaria.module.TolariaModule",
            "init_args": {
                "network": {"class_path": "esper.models.ByteLM", "init_args": {}},
                "task": {"class_path": "esper.tolaria.tasks.LanguageModeling"},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
            },
        },
        "data": {"class_path": "esper.data.ByteText", "init_args": {"steps_per_epoch": steps, "report_windows": 8}},
        "tamiyo": {"policy": "schedule", "targets": ["*.after_attn", "*.ffn"], "kasmina": seeds, "settings": settings},
        "nissa": {"title": "speed", "output_dir": str(folder / "run")},
        "forge": {"enabled": True, "root": str(forge), "adopt": "any"},
        "trainer": {"accelerator": "cpu", "max_steps": steps, "callbacks": [times], **limits, **silent},
    }


def _plantings(steps: int) -> list[dict[str, Any]]:
    """Return one planting for every few boundaries, of the kinds in turn."""
    moments = range(_EVERY, steps, _OF_A_GRAFT * _EVERY)
    return [{"at": at, "blueprint": _KINDS[n % len(_KINDS)], "params": 3000} for n, at in enumerate(moments)]


class StepTimes(Callback):
    """Writes when every training step began, how long it took, and how the run's cache of kernels did.

    Args:
        folder: gets `steps.json`.
    """

    def __init__(self, folder: str) -> None:
        """Start without times."""
        self.folder = Path(folder)
        self.began: list[float] = []
        self.times: list[float] = []
        self.lookups: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock; validation between two steps is no part of either."""
        self.began.append(time.monotonic())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop the clock, and look how the cache did."""
        self.times.append(time.monotonic() - self.began[-1])
        self.lookups.append(_counts(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        told = {"began": self.began, "times": self.times, "lookups": self.lookups}
        write(self.folder / STEPS_FILE, told)


def _counts(trainer: Trainer) -> tuple[int, int]:
    """Return how many lookups of a kernel found it in memory so far, and how many there were."""
    tamiyo = next(c for c in trainer.callbacks if isinstance(c, Tamiyo))  # type: ignore[attr-defined]
    assert tamiyo.controller is not None and isinstance(store := tamiyo.controller.store, ForgeStore)
    compiled, eager = store.cache.counts(), store.eager.cache.counts()
    # What has no compiled kernel is looked up among the eager ones next.
    found = compiled.hits + eager.hits
    return found, found + eager.misses


def main(argv: Sequence[str] | None = None) -> int:
    """Make the run of a folder's job."""
    parser = argparse.ArgumentParser(prog="esper.bench.speed.training", description="Train, and time every step.")
    parser.add_argument("folder", type=Path, help="holds job.json")
    folder: Path = parser.parse_args(argv).folder
    with plain_errors():
        job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        EsperCLI({"subcommand": "fit", "fit": job}, tell=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
