"""Makes one row in a process of its own: trains one arm with one seed, and measures what came of it.

`python -m esper.bench.worker FOLDER` reads `job.json` there and writes `row.json` beside it.
"""

import argparse
import json
import platform
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Final

import torch
from torch.utils._pytree import tree_flatten

from esper import __version__
from esper.bench.arms import Config
from esper.bench.experiment import OUTPUT
from esper.bench.rows import FORMAT, JOB_FILE, ROW_FILE, Row, write
from esper.blueprints import SiteShape
from esper.config import moved
from esper.console import plain_errors
from esper.data.base import EsperDataModule
from esper.leyline.errors import ConfigError
from esper.run import EsperCLI, spelled_out
from esper.tamiyo.callback import Tamiyo
from esper.tolaria.evidence import batch_size, unit_losses, units_of
from esper.tolaria.parts import has_report_part
from esper.tolaria.recipe import kept_children
from esper.tolaria.snapshot import undisturbed

_REPEATS: Final = 30
_WARM_UP: Final = 3
_LATENCY_S: Final = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Make the row of a folder's job."""
    parser = argparse.ArgumentParser(prog="esper.bench.worker", description="Make one row of a bench.")
    parser.add_argument("folder", type=Path, help="holds job.json")
    folder: Path = parser.parse_args(argv).folder
    with plain_errors():
        job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        write(folder / ROW_FILE, make(job["config"], job["work"], folder))
    return 0


def make(config: Config, work: float | None, folder: Path) -> Row:
    """Train one configuration, and return its row.

    Args:
        config: what is run; `OUTPUT` stands for its folder.
        work: multiply-accumulates that the training takes; None takes the steps of the configuration.
        folder: of the run.

    Raises:
        EsperError: the configuration or the data will not do.
    """
    there: Config = moved(config, OUTPUT, str(folder))
    if work is not None:
        there = lasting(there, max(1, round(work / work_of_a_step(there))))
    return _row(_trained(there), folder)


def lasting(config: Config, steps: int) -> Config:
    """Return a configuration of so many training steps; a schedule that follows the trainer follows this one.

    Example:
        >>> lasting({"trainer": {"max_epochs": 3}}, 90)
        {'trainer': {'max_epochs': -1, 'max_steps': 90}}
    """
    return config | {"trainer": config["trainer"] | {"max_epochs": -1, "max_steps": steps}}


def work_of_a_step(config: Config) -> float:
    """Return the multiply-accumulates of one training step, by the account of a run of one step."""
    with TemporaryDirectory() as scratch:
        brief = lasting(moved(config, str(config["output_dir"]), scratch), 1)
        limits = {"limit_val_batches": 1, "limit_test_batches": 1}
        cli = _trained(brief | {"trainer": brief["trainer"] | limits})
    return _counted(cli)


def _trained(config: Config) -> EsperCLI:
    sections = config | {name: spelled_out(config[name]) for name in ("model", "data") if name in config}
    return EsperCLI({"subcommand": "fit", "fit": sections}, tell=False)


def _tamiyo(cli: EsperCLI) -> Tamiyo:
    found: Tamiyo = cli.config_init[str(cli.subcommand)].tamiyo
    return found


def _counted(cli: EsperCLI) -> float:
    """Return the work of a run's training.

    Raises:
        ConfigError: the run kept no account.
    """
    assert cli.outcome is not None
    if not cli.outcome.grown.train_macs:
        raise ConfigError(
            "the run kept no account of its work, so arms cannot be compared at equal compute; it needs a validation "
            "loop, and a network whose operations torch can count."
        )
    return float(cli.outcome.grown.train_macs)


# --- what came of it ------------------------------------------------------------------------------------------------


def _row(cli: EsperCLI, folder: Path) -> Row:
    assert cli.outcome is not None
    run = cli.outcome.grown
    if run.report_loss is None:
        raise ConfigError("the run measured no report loss; its test loop must log one, or its module return losses.")
    if run.report_samples:
        write(folder / "report_losses.json", list(run.report_samples))
    return {
        "format": FORMAT,
        "report_loss": run.report_loss,
        "report_accuracy": report_accuracy(cli),
        "report_part": report_part(cli),
        "decision_loss": run.decision_loss,
        "host_params": run.host_params,
        "params": run.host_params + run.added_params,
        "steps": run.steps,
        "seconds": run.seconds,
        "search_share": run.search_share,
        **_work(cli),
        **latency(cli),
        "peak_mib": peak_mib(),
        "kept": [line.blueprint for line in run.grafts if line.kept],
        "children": kept_children(folder / "model"),
        "sites": sites(_tamiyo(cli)),
        "versions": _versions(cli),
    }


def _work(cli: EsperCLI) -> dict[str, float]:
    tamiyo, train = _tamiyo(cli), _counted(cli)
    forward = tamiyo.tally.work.host + tamiyo.history[-1]["added_macs"]
    return {
        "train_macs": train,
        "train_flops": 2 * train,
        "inference_macs": forward,
        "inference_flops": 2 * forward,
    }


def _versions(cli: EsperCLI) -> dict[str, str]:
    return {
        "esper": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(cli.trainer.strategy.root_device),
    }


def sites(tamiyo: Tamiyo) -> list[dict[str, Any]]:
    """Return the places that may grow, as `esper.bench.children.site_of` reads them; whole layers, without chunks."""
    layers = [layer for layer in tamiyo.bank.all_layers() if layer.refusal is None]
    known = [(layer, layer.facts) for layer in layers if layer.facts is not None]
    return [
        {
            "path": layer.path,
            "shape": SiteShape(facts.layout, facts.input_width, facts.width, facts.tokens, layer.kind)._asdict(),
            "depth": index / max(1, len(known) - 1),
            "same_grid": facts.same_grid,
        }
        for index, (layer, facts) in enumerate(known)
    ]


def report_accuracy(cli: EsperCLI) -> float | None:
    """Return the accuracy that the test loop logged; None if it logged none."""
    logged = cli.trainer.callback_metrics.items()
    return next((float(value) for name, value in logged if "acc" in name.lower() and not name.startswith("val")), None)


def report_part(cli: EsperCLI) -> str:
    """Return where the report losses come from, which nothing that decides has read.

    Raises:
        ConfigError: the decisions of the run read the same part.
    """
    data = cli.datamodule
    if isinstance(data, EsperDataModule):
        if data.decision_part == data.report_part or data.parts.decision is data.parts.report:
            raise ConfigError(f"{type(data).__name__} decides and reports on the same part; give it three parts.")
        return f"the report part of {type(data).__name__}, disjoint from what decides"
    if has_report_part(cli.trainer, cli.model):
        return "the run's own test loader; that it is disjoint from validation is the data module's to see to"
    return "the odd validation batches; the even ones decide"


def latency(cli: EsperCLI) -> dict[str, Any]:
    """Return the median time of a forward of the first batch of the decision part, in evaluation, in milliseconds."""
    source = cli.datamodule if cli.datamodule is not None else cli.model
    loaders, _ = tree_flatten(source.val_dataloader())
    cli.model.to(cli.trainer.strategy.root_device)
    taken: list[float] = []
    with undisturbed(cli.model):
        unit = units_of(cli.model, next(iter(loaders[0])))[0]
        for _ in range(_WARM_UP):
            unit_losses(cli.trainer, cli.model, unit)
        while len(taken) < _REPEATS and sum(taken) < _LATENCY_S:
            started = perf_counter()
            unit_losses(cli.trainer, cli.model, unit)
            taken.append(perf_counter() - started)
    return {"latency_ms": 1000 * median(taken), "latency_batch": batch_size(unit.batch)}


def peak_mib() -> float:
    """Return the most memory that this process has had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # What `getrusage` tells would include the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    raise SystemExit(main())
