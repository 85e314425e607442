"""What one rank of a sharded run from a configuration does: it writes checkpoint folders, and resumes by itself.

Arguments: the job's folder, a moment at which rank 0 is killed in a save or `never`, and the runs' folders in it.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from esper.run import EsperCLI
from esper.tolaria import sharded
from esper.tolaria.exchange import bit_sum
from tests.distributed import ddp_job
from tests.distributed.ddp_job import life
from tests.helpers import QUICK

EVERY, STEPS = 6, 30
_SAVES = 6
"""Saves that end well before the deadly one: three checkpoints, each also under the name of the last."""


def config(folder: Path) -> dict[str, Any]:
    """The configuration that `esper fit --config` and train.py hand over."""
    mine = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": EVERY, "save_top_k": 2, "monitor": "step"}
    mine |= {"filename": "{step}", "mode": "max", "save_last": True}
    strategy = {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"}
    settings = life() | {"schedule": list(life()["schedule"])}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return {
        "seed_everything": 3,
        "output_dir": str(folder),
        "resume": "auto",
        "model": {"class_path": "tests.distributed.fsdp_job.Sharded"},
        "data": {"class_path": "esper.data.Digits", "init_args": {"batch_size": 32, "train": 640}},
        "tamiyo": {"policy": "schedule", "kasmina": QUICK, "settings": settings, "targets": ["net.*"]},
        "trainer": quiet
        | {
            "max_steps": STEPS,
            "num_sanity_val_steps": 0,
            "devices": 2,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": mine}],
            "strategy": {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": strategy},
        },
    }


def die_in(moment: str) -> None:
    """Let rank 0 be killed in the middle of a save: before or after a step of it."""
    if moment == "never" or ddp_job.RANK:
        return
    name, when = moment.split("-")
    real, calls = getattr(sharded, name), iter(range(10**6))

    def deadly(*args: Any) -> Any:
        last = next(calls) == _SAVES
        found = real(*args) if not last or when == "after" else None
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(sharded, name, deadly)


def told(cli: EsperCLI) -> dict[str, Any]:
    """Return what this rank's run came to."""
    tamiyo, optimizer = cli.config_init["fit"].tamiyo, cli.trainer.optimizers[0]
    bank = tamiyo.bank
    host = [p.full_tensor() for p in cli.model.net.parameters() if isinstance(p, DTensor)]
    moments = [v.full_tensor() for s in optimizer.state.values() for v in s.values() if isinstance(v, DTensor)]
    return {
        "losses": list(cli.model.train_losses),
        "host": bit_sum(host),
        "moments": bit_sum(moments),
        "children": bit_sum(p for graft in bank.grafted().values() for p in graft.child.parameters()),
        "topology": bank.topology(),
        "history": tamiyo.history,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    ddp_job.RANK, ddp_job.SIZE = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    out = Path(sys.argv[1])
    die_in(sys.argv[2])
    runs = {name: EsperCLI({"subcommand": "fit", "fit": config(out / name)}, tell=False) for name in sys.argv[3:]}
    ddp_job.tell({name: told(cli) for name, cli in runs.items()}, out)
