"""Train a wrapped model from Python: Lightning underneath, no Lightning code to write."""

from pathlib import Path
from statistics import fmean
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import OptimizerCallable

from esper.kasmina.wrapper import MorphableModel
from esper.leyline.errors import ConfigError
from esper.tamiyo.callback import Tamiyo
from esper.tamiyo.controller import TamiyoController
from esper.tolaria.checkpoint import require_readable
from esper.tolaria.config import TolariaConfig
from esper.tolaria.module import TolariaModule
from esper.tolaria.parts import has_report_part
from esper.tolaria.report import report_losses
from esper.tolaria.resume import AUTO, chosen
from esper.tolaria.tasks import Task


class TolariaTrainer:
    """Trains a wrapped model and lets its controller grow it.

    Args:
        model: the wrapped model.
        controller: policy and gates.
        config: `TolariaConfig`, a dict of its keys, or None.
        data: a ready data module; None builds the one that `config.data` names.

    Raises:
        ConfigError: the config is not valid, or no data are given.
    """

    def __init__(
        self,
        model: MorphableModel,
        controller: TamiyoController,
        config: TolariaConfig | dict[str, Any] | None = None,
        *,
        data: LightningDataModule | None = None,
    ) -> None:
        """Build data, task and optimizer from the config."""
        self.model, self.controller = model, controller
        self.config = TolariaConfig.of(config)
        if data is None and self.config.data is None:
            raise ConfigError("no data: set tolaria.data.class_path, e.g. esper.data.Digits, or pass data=.")
        self._parts = _instantiate(self.config)
        self.data: LightningDataModule = data if data is not None else self._parts.data

    def train(self, ckpt_path: str | None = None) -> tuple[MorphableModel, list[dict[str, float]]]:
        """Fit, then measure the report part once.

        Args:
            ckpt_path: checkpoint to resume from; a folder, or `auto` for the output folder, stands for the newest
                good one in it.

        Returns:
            The grown model, and one record per boundary; the last one also holds `report_loss`.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, or holds weights only.
        """
        if ckpt_path == AUTO or (ckpt_path is not None and Path(ckpt_path).is_dir()):
            ckpt_path = chosen(ckpt_path, self.config.output_dir)
        require_readable(ckpt_path, resuming=True)
        if self.config.seed is not None:
            seed_everything(self.config.seed, verbose=False)
        callback = Tamiyo(
            self.controller.config.policy,
            controller=self.controller,
            output_dir=self.config.output_dir,
            child_lr_scale=self.config.child_lr_scale,
            child_warmup_steps=self.config.child_warmup_steps,
        )
        trainer = self._trainer(callback)
        module = TolariaModule(
            network=self.model,
            task=self._parts.task,
            optimizer=self._parts.optimizer,
            warmup_steps=self.config.warmup_steps,
            decay=self.config.decay,
            floor=self.config.floor,
        )
        trainer.fit(module, datamodule=self.data, ckpt_path=ckpt_path)
        found = self._measure(trainer, module)
        history = [dict(entry) for entry in callback.history]
        if history:
            history[-1] |= found
        return self.model, history

    def _measure(self, trainer: Trainer, module: TolariaModule) -> dict[str, float]:
        """Return what the report part says: the test loader, or else the odd validation batches."""
        if has_report_part(trainer, module):
            found = trainer.test(module, datamodule=self.data, verbose=False)
            return {name: float(value) for name, value in found[0].items()} if found else {}
        losses = report_losses(trainer, module)
        return {"report_loss": fmean(losses)} if losses else {}

    def _trainer(self, callback: Tamiyo) -> Trainer:
        config = self.config
        keep = ModelCheckpoint(dirpath=f"{config.output_dir}/checkpoints", save_last=True)
        return Trainer(
            max_epochs=config.max_epochs,
            max_steps=config.max_steps,
            val_check_interval=config.val_check_interval,
            check_val_every_n_epoch=None if config.val_check_interval else 1,
            gradient_clip_val=config.gradient_clip_val,
            precision=config.precision,  # type: ignore[arg-type]
            accelerator=config.accelerator,
            devices=1,
            logger=False,
            callbacks=[callback, keep] if config.checkpoint else [callback],
            enable_checkpointing=config.checkpoint,
            enable_progress_bar=config.progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=config.output_dir,
        )


def _instantiate(config: TolariaConfig) -> Any:
    """Let jsonargparse check types and build the objects, exactly as the command line does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=Task)
    parser.add_argument("--optimizer", type=OptimizerCallable)
    parser.add_argument("--data", type=LightningDataModule | None)
    given = {"task": config.task, "optimizer": config.optimizer, "data": config.data}
    try:
        parsed = parser.parse_object({k: v.model_dump() if v else None for k, v in given.items()})
    except ArgumentError as error:
        raise ConfigError(f"tolaria: {error}") from error
    return parser.instantiate(parsed)
