"""One run from one configuration: build, train and grow, measure, compare with the twin, tell.

The same sections serve the command line (`esper fit --config run.yaml`) and Hydra (`python train.py`):

```
seed_everything, threads, output_dir, compare, resume    of the run
model, data                                      class_path and init_args
tamiyo, nissa, forge, trainer                    arguments of esper.Tamiyo, GrowthReport, Forge and Lightning's Trainer
```
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentError
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

# Importing these lets `--model TolariaModule` and `--data Digits` name them without their full path.
import esper.data
import esper.models
import esper.tolaria.module  # noqa: F401
from esper.config import moved
from esper.console import config_error
from esper.forge.client import Forge
from esper.leyline.errors import EsperError
from esper.nissa.callback import GrowthReport
from esper.nissa.folder import require_writable
from esper.nissa.page.page import write_page
from esper.nissa.progress import GrowthProgress
from esper.nissa.summary import RunResult, summarize
from esper.nissa.terminal import present
from esper.nissa.wandb.log import WandbEnd
from esper.quiet import quiet
from esper.tamiyo.callback import Tamiyo
from esper.tolaria.checkpoint import require_readable
from esper.tolaria.distributed import Ranks
from esper.tolaria.parts import has_report_part
from esper.tolaria.report import report_losses, with_test_step
from esper.tolaria.resume import AUTO, chosen

CONFIG_FILE = "config.yaml"
"""The run's configuration as it was understood: `esper fit --config FILE` repeats the run."""

TWIN = "twin"
"""Folder of the twin, inside the run's."""

_log = logging.getLogger(__name__)

_ONCE = ("config", "ckpt_path", "weights_only", "resume")
"""What one start of a run was told, and a repetition of it is not."""

_NOT_SETTINGS = {"help", "config", "print_config", "return_predictions", "verbose"}


class Outcome(NamedTuple):
    """What came of a run.

    Args:
        grown: the run as configured.
        twin: the same run with the policy `off`; None unless `compare` is set.
    """

    grown: RunResult
    twin: RunResult | None = None


def run(config: dict[str, Any]) -> Outcome:
    """Train as a plain configuration says, and tell what came of it.

    Args:
        config: the sections named at the head of this file, without interpolations. What stands beside a `class_path`
            of `model` or `data` is short for the same key of its `init_args`.

    Raises:
        EsperError: the configuration, the data or the output folder will not do.
    """
    sections = config | {name: spelled_out(config[name]) for name in ("model", "data") if name in config}
    outcome = EsperCLI({"subcommand": "fit", "fit": sections}).outcome
    assert outcome is not None
    return outcome


def spelled_out(section: Any) -> Any:
    """Return a section of a class with its short keys in their long place.

    Example:
        >>> spelled_out({"class_path": "esper.data.Digits", "init_args": {"train": None}, "train": 9})
        {'class_path': 'esper.data.Digits', 'init_args': {'train': 9}}
    """
    if not isinstance(section, dict) or "class_path" not in section:
        return section
    long = {key: value for key, value in section.items() if key in ("class_path", "init_args", "dict_kwargs")}
    short = {key: value for key, value in section.items() if key not in long and value is not None}
    return {**long, "init_args": {**(long.get("init_args") or {}), **short}} if short else long


class EsperCLI(LightningCLI):
    """Lightning's command line with growth: any LightningModule, any LightningDataModule.

    Args:
        args: arguments after the program's name, or `{"subcommand": "fit", "fit": {...}}`.
        tell: whether a fit prints what came of it.

    Raises:
        ConfigError: an argument is not accepted; a near miss is named.
    """

    def __init__(self, args: ArgsType, *, tell: bool = True) -> None:
        """Parse, build and carry out the command."""
        quiet()
        self.outcome: Outcome | None = None
        self.tell = tell
        self._report = ReportPart()
        super().__init__(
            args=args,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # A grown model is saved with its topology; hyperparameters alone could not rebuild it.
            load_from_checkpoint_support=False,
        )

    @property
    def section(self) -> Any:
        """The parsed configuration of the command."""
        return self.config[str(self.subcommand)]

    @property
    def growth(self) -> GrowthReport:
        """The callback that watches growth."""
        found: GrowthReport = self.config_init[str(self.subcommand)].nissa
        return found

    @property
    def forge(self) -> Forge:
        """Where the run's kernels come from."""
        found: Forge = self.config_init[str(self.subcommand)].forge
        return found

    # --- parse --------------------------------------------------------------------------------------------------

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that raises instead of exiting, and resolves `${...}`."""
        return super().init_parser(
            **{"exit_on_error": False, "parser_mode": "omegaconf", "allow_abbrev": False} | kwargs
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections of growth and the settings of the run."""
        parser.add_lightning_class_args(Tamiyo, "tamiyo")
        parser.add_lightning_class_args(GrowthReport, "nissa")
        parser.add_class_arguments(Forge, "forge")
        parser.add_argument("--output_dir", type=str, default="outputs", help="Folder of everything the run writes.")
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="auto, a folder or a file: go on from its checkpoint.",
        )
        parser.add_argument("--compare", type=bool, default=False, help="Train again without growth, and compare.")
        parser.add_argument("--threads", type=PositiveInt | None, default=None, help="CPU threads of torch.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and say in plain words what is not accepted."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            known = {action.dest for part in self._subcommand_parsers.values() for action in part._actions}
            raise config_error(str(error), sorted(known - _NOT_SETTINGS)) from error

    # --- build --------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Choose threads and folders; refuse a folder that cannot be written before anything is built."""
        config = self.section
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        for section, key in (("tamiyo", "output_dir"), ("nissa", "output_dir"), ("trainer", "default_root_dir")):
            if config[section][key] is None:
                config[section][key] = config.output_dir
        fitting = self.subcommand == "fit"
        self._choose_checkpoint(config)
        require_readable(config.get("ckpt_path"), weights_only=config.get("weights_only"), resuming=fitting)
        if fitting:
            require_writable(config.output_dir)

    def _choose_checkpoint(self, config: Any) -> None:
        """Let `resume`, or `ckpt_path=auto`, name the newest good checkpoint; the twin looks for its own."""
        asked = config.resume if config.resume is not None else config.get("ckpt_path")
        if asked is not None and (config.resume is not None or asked == AUTO or Path(asked).is_dir()):
            config.ckpt_path = chosen(asked, config.output_dir, without=(TWIN,))

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; an error of ours that the parser has wrapped comes out as it was."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error.__cause__, EsperError):
                raise error.__cause__ from None
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; unless another bar is given, its progress bar shows the seeds."""
        trainer = self.config_init[str(self.subcommand)].trainer
        given = trainer.callbacks or []
        callbacks = list(given) if isinstance(given, Sequence) else [given]
        callbacks.append(self._report)
        bar = trainer.enable_progress_bar is not False and not trainer.barebones
        if bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(GrowthProgress())
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    # --- fit ----------------------------------------------------------------------------------------------------

    def fit(self, model: LightningModule, **given: Any) -> None:
        """Train, measure the report part, repeat without growth if asked to, and tell."""
        config = self._plain()
        first_rank = self.trainer.is_global_zero
        if first_rank:
            (Path(config["output_dir"]) / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False))
        with WandbEnd(self.trainer.loggers, config["output_dir"]) as wandb:
            self.outcome = Outcome(self._train(model, given))
            if config["compare"]:
                wandb.make_way()
                self.outcome = self._compared(self.outcome.grown, config)
        if self.tell and first_rank:
            present(self.outcome.grown, self.outcome.twin, page=_page(config["output_dir"]))

    def _compared(self, grown: RunResult, config: dict[str, Any]) -> Outcome:
        """Train the twin."""
        again = {"resume": AUTO} if self.section.resume == AUTO else {}
        twin = EsperCLI({"subcommand": "fit", "fit": twin_of(config) | again}, tell=False)
        assert twin.outcome is not None
        if self.trainer.is_global_zero:
            self.growth.draw(twin.growth.chronicle)
        return Outcome(grown, twin.outcome.grown)

    def _plain(self) -> dict[str, Any]:
        """Return the configuration as plain data that the same command takes again."""
        dumped = self.parser.dump(self.config, skip_none=False, skip_validation=True)
        config: dict[str, Any] = yaml.safe_load(dumped)[self.subcommand]
        config["forge"]["before"] = self.forge.before
        return {key: value for key, value in config.items() if key not in _ONCE}

    def _train(self, model: LightningModule, given: dict[str, Any]) -> RunResult:
        started, report = perf_counter(), self._report
        tamiyo: Tamiyo = self.config_init[str(self.subcommand)].tamiyo
        with self.forge:
            self._use_forge(tamiyo)
            self.trainer.fit(model, **given)
            missed = self.forge.unfinished()
        if has_report_part(self.trainer, model):
            with with_test_step(model):
                self.trainer.test(model, datamodule=given.get("datamodule"), verbose=False)
        else:
            report.samples += report_losses(self.trainer, model)
        # Each rank has measured its share.
        report.samples[:] = [loss for share in Ranks.of(self.trainer).gather(report.samples) for loss in share]
        result = summarize(
            self.growth.chronicle,
            title=self.growth.title,
            output_dir=str(self.section.output_dir),
            report_loss=report.loss,
            report_samples=tuple(report.samples) or None,
            train_macs=round(tamiyo.tally.work.total) or None,
            seconds=perf_counter() - started,
        )
        return replace(result, missed_kernels=missed)

    def _use_forge(self, tamiyo: Tamiyo) -> None:
        """Let the run have compiled kernels too, unless nothing grows in it or ranks would have to agree on them."""
        if tamiyo.store is None and tamiyo.config.policy != "off" and self.trainer.world_size == 1:
            tamiyo.store = self.forge.store(self.growth.title)


class ReportPart(Callback):
    """Keeps what was found on the report part: the loss of every sample where that is known, else the mean."""

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self.samples: list[float] = []
        self._logged: float | None = None

    @property
    def loss(self) -> float | None:
        """The report loss; None if the test loop logged none."""
        return sum(self.samples) / len(self.samples) if self.samples else self._logged

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the loss of each sample."""
        losses = getattr(pl_module, "decision_losses", None)
        if losses is not None:
            with trainer.precision_plugin.test_step_context():
                self.samples += losses(batch).detach().float().flatten().tolist()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the mean that was logged."""
        found = (float(value) for name, value in trainer.callback_metrics.items() if "loss" in name)
        self._logged = next(found, None)


def _page(folder: str) -> Path | None:
    """Write the page about a run; one in which nothing was decided, under the policy `off`, has none."""
    try:
        return write_page([folder])
    except EsperError as error:
        _log.debug("there is no page: %s", error)
        return None


def twin_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the same run without growth; whatever was written under the run's folder goes to its `twin` folder."""
    folder = config["output_dir"]
    there: dict[str, Any] = moved(config, folder, f"{folder}/{TWIN}")
    return there | {"compare": False, "tamiyo": there["tamiyo"] | {"policy": "off"}}
