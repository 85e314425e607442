"""One run from one configuration: build, train, grow, measure, compare with the twin, tell.

The same sections serve the command line (`esper fit --config run.yaml`) and Hydra (`python train.py`):

```
seed_everything, threads, output_dir, compare    of the run
model, data                                      class_path and init_args
tamiyo, nissa, trainer                           arguments of esper.Tamiyo, GrowthReport and lightning's Trainer
```
"""

import sys
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentError
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger

# Importing these lets `--model TolariaModule` and `--data Digits` name them without their full path.
import esper.data
import esper.models
import esper.tolaria.module  # noqa: F401
from esper.console import config_error
from esper.nissa.callback import GrowthReport
from esper.nissa.folder import require_writable
from esper.nissa.progress import GrowthProgress
from esper.nissa.summary import RunResult, summarize
from esper.nissa.terminal import present
from esper.quiet import quiet
from esper.report import ReportPart
from esper.tamiyo.callback import Tamiyo, has_report_part

CONFIG_FILE = "config.yaml"
TWIN = "twin"


class Outcome(NamedTuple):
    """What came of a run.

    Args:
        grown: the run as configured.
        twin: the same run with the policy `off`; None unless `compare` was set.
    """

    grown: RunResult
    twin: RunResult | None = None


def run(config: dict[str, Any]) -> Outcome:
    """Train as a plain configuration says, and tell what came of it.

    Args:
        config: the sections named at the head of this file, fully resolved.

    Raises:
        EsperError: the configuration, the data or the output folder will not do.
    """
    made = command({"subcommand": "fit", "fit": config})
    outcome = made.outcome()
    present(outcome.grown, outcome.twin)
    return outcome


def command(args: list[str] | dict[str, Any]) -> "EsperCLI":
    """Parse and carry out a command.

    Raises:
        ConfigError: the arguments are not accepted; a near miss is named.
    """
    quiet()
    parsed = Parsed()
