"""Rows and experiments without a run behind them."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esper.bench.arms import Plan
from esper.bench.experiment import Experiment, prepared, with_seed

SITES = [
    {"path": "layers.0", "shape": ["bd", 64, 16, 1, "linear"], "depth": 0.0},
    {"path": "layers.2", "shape": ["bd", 16, 16, 1, "mlp"], "depth": 0.5},
    {"path": "layers.4", "shape": ["bd", 16, 10, 1, "linear"], "depth": 1.0},
]
NAMES = ("layout", "d_in", "d_out", "tokens", "kind")


def plain_row(loss: float | None = 1.0, **given: Any) -> dict[str, Any]:
    """A row as a run leaves it."""
    return {
        "format": 1,
        "report_loss": loss,
        "report_accuracy": 0.9,
        "report_part": "the report part of Digits",
        "decision_loss": loss,
        "host_params": 1630,
        "params": 2230,
        "steps": 100,
        "train_macs": 1000.0,
        "train_flops": 2000.0,
        "search_share": 0.1,
        "inference_macs": 10.0,
        "inference_flops": 20.0,
        "latency_ms": 0.5,
        "latency_batch": 64,
        "seconds": 2.0,
        "process_seconds": 3.0,
        "peak_mib": 400.0,
        "kept": [],
        "children": [],
        "sites": [{**s, "shape": dict(zip(NAMES, s["shape"], strict=True)), "same_grid": True} for s in SITES],
        "versions": {"esper": "0", "torch": "2", "python": "3", "machine": "m", "device": "cpu"},
        "key": f"{loss}",
        **given,
    }


def digits() -> dict[str, Any]:
    """A configuration of `esper fit` that trains and grows in a second."""
    return {
        "seed_everything": 0,
        "threads": 1,
        "output_dir": "outputs/digits",
        "model": {
            "class_path": "esper.tolaria.module.TolariaModule",
            "init_args": {
                "network": {"class_path": "esper.models.MLP", "init_args": {"widths": [64, 16, 4, 16, 10]}},
                "task": {"class_path": "esper.tolaria.tasks.Classification"},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
            },
        },
        "data": {"class_path": "esper.data.Digits", "init_args": {"seed": 0}},
        "tamiyo": {
            "targets": ["layers.2"],
            "kasmina": {"ramp_steps": 5, "stabilization_steps": 10, "telemetry_every": 4},
            "settings": {"start": 18, "budget": 600, "proxy": 120, "menu": ["BP-MLP-GELU", "BP-WIDEN"]},
        },
        "nissa": {"title": "tiny", "output_dir": "outputs/digits"},
        "trainer": {"accelerator": "cpu", "max_steps": 80, "enable_model_summary": False},
    }


def tiny() -> Experiment:
    """The same as an experiment."""
    return Experiment("tiny", lambda seed, further: with_seed(digits(), seed))


def plan(**found: Any) -> Plan:
    """What its arms are made from."""
    return Plan(prepared(digits()), found=plain_row(**found))


WORKER = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
row = json.loads((folder.parents[1] / "sample.json").read_text())
with (folder.parents[1] / "made.txt").open("a") as made:
    made.write(folder.name + "\\n")
act = json.loads((folder.parents[1] / "acts.json").read_text()).get(folder.name, "")
print("said before")
if act == "fail":
    sys.exit("error: no room for it")
if act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "wait":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
row["train_macs"] = job["work"] or row["train_macs"]
(folder / "row.json").write_text(json.dumps(row))
"""
"""A worker that trains nothing: a row is what `sample.json` holds, unless `acts.json` says how it ends."""


def stub(folder: Path, **acts: str) -> tuple[str, ...]:
    """Return the command of a process that ends as it is told, by the name of the row's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "worker.py").write_text(WORKER)
    (folder / "acts.json").write_text(json.dumps(acts))
    (folder / "sample.json").write_text(json.dumps(plain_row()))
    return sys.executable, str(folder / "worker.py")


def made(folder: Path) -> list[str]:
    """Return the rows that processes were started for, in order."""
    file = folder / "made.txt"
    return file.read_text().split() if file.exists() else []


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
