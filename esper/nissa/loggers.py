"""Loggers that need no service: CSV, TensorBoard, and Weights & Biases, offline unless asked otherwise."""

import os

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from esper.leyline.errors import ConfigError
from esper.nissa.folder import require_writable
from esper.nissa.wandb.key import has_wandb_key

__all__ = ["csv_logger", "has_wandb_key", "tensorboard_logger", "wandb_logger"]


def csv_logger(*, save_dir: str = "outputs") -> CSVLogger:
    """Return a logger that writes `metrics.csv`."""
    return CSVLogger(save_dir, name="csv")


def tensorboard_logger(*, save_dir: str = "outputs") -> TensorBoardLogger:
    """Return a logger for TensorBoard."""
    return TensorBoardLogger(save_dir, name="tensorboard")


def wandb_logger(
    *, project: str = "esper", group: str = "", online: bool = False, save_dir: str = "outputs"
) -> WandbLogger:
    """Return a logger for Weights & Biases; offline runs can be sent later by `wandb sync`.

    A run and its twin are open at the same time, so neither is the `wandb.run` of the process.

    Args:
        project: name of the project.
        group: name of the run, and of the group that it shares with its twin; empty leaves both to W&B.
        online: whether to send while training; needs a key.
        save_dir: folder of the run's files.

    Raises:
        ConfigError: online without a key, or the package is missing.
        OutputError: the folder cannot be written.
    """
    if online and not has_wandb_key():
        raise ConfigError(
            "W&B online needs a key: set WANDB_API_KEY or run `wandb login`; or leave online=False and send the run "
            "later with `wandb sync`."
        )
    if not online:
        # wandb reads this once, at its import; its own error reports would go to the network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    folder = require_writable(save_dir)
    try:
        return WandbLogger(
            project=project,
            offline=not online,
            save_dir=folder,
            mode="online" if online else "offline",
            name=group or None,
            group=group or None,
            reinit="create_new",
        )
    except ModuleNotFoundError as error:
        raise ConfigError("the W&B logger needs the package wandb: pip install wandb.") from error
