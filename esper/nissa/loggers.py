"""Loggers that need no service: CSV, TensorBoard, and Weights & Biases, offline unless asked otherwise."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from esper.leyline.errors import ConfigError
from esper.nissa.folder import require_writable

_HOST = "https://api.wandb.ai"


def csv_logger(*, save_dir: str = "outputs") -> CSVLogger:
    """Return a logger that writes `metrics.csv`."""
    return CSVLogger(save_dir, name="csv")


def tensorboard_logger(*, save_dir: str = "outputs") -> TensorBoardLogger:
    """Return a logger for TensorBoard."""
    return TensorBoardLogger(save_dir, name="tensorboard")


def wandb_logger(*, project: str = "esper", online: bool = False, save_dir: str = "outputs") -> WandbLogger:
    """Return a logger for Weights & Biases; offline runs can be sent later by `wandb sync`.

    Args:
        project: name of the project.
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
        return WandbLogger(project=project, offline=not online, save_dir=folder, mode="online" if online else "offline")
    except ModuleNotFoundError as error:
        raise ConfigError("the W&B logger needs the package wandb: pip install wandb.") from error


def has_wandb_key() -> bool:
    """Return whether a key is at hand, in the environment or in a netrc file; the key itself is not looked at."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    named = os.environ.get("NETRC")
    places = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _HOST).netloc
    return any(_knows(place, host) for place in places)


def _knows(file: Path, host: str) -> bool:
    try:
        return netrc.netrc(file).hosts.get(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
