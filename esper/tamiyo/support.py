"""What a trainer and a module must be like for growth; anything else is refused before the first step."""

from lightning.pytorch import LightningModule, Trainer

from esper.leyline.errors import ConfigError, DataError
from esper.tolaria.parts import validates


def require_supported(trainer: Trainer, module: LightningModule, *, judges: bool) -> None:
    """Check a fit that is about to start.

    Args:
        trainer: the trainer.
        module: what it trains.
        judges: whether grafts will be judged on the validation loader.

    Raises:
        ConfigError: the trainer or the module works in a way that growth does not support.
        DataError: grafts are to be judged, and nothing is there to judge them on.
    """
    if not module.automatic_optimization:
        raise ConfigError("Tamiyo needs automatic optimization; set automatic_optimization=True on the module.")
    if trainer.world_size > 1:
        raise ConfigError(f"growth on {trainer.world_size} processes is not supported yet; use devices=1.")
    if len(trainer.optimizers) != 1:
        raise ConfigError(f"Tamiyo needs one optimizer, the module configures {len(trainer.optimizers)}.")
    if judges and not validates(trainer):
        raise DataError(
            "the decision part is missing: this run does not validate. Give the trainer a validation loader and "
            "the module a validation_step (and leave limit_val_batches above 0), or pass decision_loader= to "
            "Tamiyo, or use policy='off'."
        )
