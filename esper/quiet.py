"""Keep the libraries underneath from talking over a run: hints about hardware and products, known deprecations."""

import logging
import warnings
from typing import Final

_CHATTER: Final = (
    "GPU available",
    "TPU available",
    "HPU available",
    "💡 Tip",
    "Loading `train_dataloader`",
    "Seed set to",
    "`Trainer.fit` stopped",
    "`Trainer(",
)
_LOGGERS: Final = (
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.logger_connector.logger_connector",
)
_SPEAKERS: Final = ("lightning", "lightning.pytorch", "lightning.fabric")
_WARNINGS: Final = (
    # Lightning uses a class of torch that torch has deprecated.
    r".*LeafSpec.*is deprecated",
    # `args` and `sys.argv` are both set because `esper` picks its command first.
    r"LightningCLI's args parameter",
    # One process that reads small data itself is the fast choice here.
    r"The '.*_dataloader' does not have many workers",
    # A run shorter than the logging interval simply logs less.
    r"The number of training batches .* is smaller than the logging interval",
    # A run's folder also holds what Hydra wrote, so it is never empty.
    r"Checkpoint directory .* exists and is not empty",
)


def _not_chatter(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_CHATTER)


def quiet() -> None:
    """Leave out what no user of Esper can act on; may be called twice."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if _not_chatter not in logger.filters:
            logger.addFilter(_not_chatter)
    if logging.getLogger().handlers:
        # Someone else, Hydra say, prints what reaches the root; Lightning's own handlers would say it twice.
        for name in _SPEAKERS:
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
