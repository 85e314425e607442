"""What a trainer and a module must be like for growth; anything else is refused before the first step."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from esper.leyline.errors import ConfigError, DataError
from esper.tolaria.averaging import require_averages
from esper.tolaria.parts import validates

# Named, not imported: their package compiles a dozen scripts when it is loaded.
_DIVIDED = frozenset({"ZeroRedundancyOptimizer", "PostLocalSGDOptimizer"})
_USE_DDP = "use strategy='ddp'"


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
    reason = why_strategy_refused(trainer.strategy)
    if reason is not None:
        raise ConfigError(f"growth does not work with {type(trainer.strategy).__name__}: {reason}.")
    if len(trainer.optimizers) != 1:
        raise ConfigError(f"Tamiyo needs one optimizer, the module configures {len(trainer.optimizers)}.")
    require_whole_optimizers(trainer.optimizers)
    require_averages(trainer, module)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(
            "every parameter of the module is frozen, so that no step can be made before the first graft; leave at "
            "least one trainable, such as the head or a norm. Frozen parts may grow all the same."
        )
    if judges and not validates(trainer):
        raise DataError(
            "the decision part is missing: this run does not validate. Give the trainer a validation loader and "
            "the module a validation_step (and leave limit_val_batches above 0), or pass decision_loader= to "
            "Tamiyo, or use policy='off'."
        )


def why_strategy_refused(strategy: Strategy) -> str | None:
    """Return why a strategy cannot train a model that grows, and what to use instead; None if it can.

    Example:
        >>> why_strategy_refused(DDPStrategy()) is None, "parent process" in why_strategy_refused(
        ...     DDPStrategy(start_method="spawn")
        ... )
        (True, True)
    """
    if isinstance(strategy, DeepSpeedStrategy):  # Which Lightning derives from DDPStrategy.
        return f"its engine fixes parameters, optimizer and gradient buckets when training starts; {_USE_DDP}"
    if isinstance(strategy, DDPStrategy):
        return _why_ddp_refused(strategy)
    if isinstance(strategy, ModelParallelStrategy):
        return _why_sharding_refused(strategy)
    if isinstance(strategy, FSDPStrategy):
        return (
            "the older FSDP flattens the parameters of a module once and for all, so that none can join or leave; "
            f"{_USE_DDP}"
        )
    if isinstance(strategy, SingleDeviceStrategy) or getattr(strategy, "world_size", 1) == 1:
        return None
    return f"growth on several processes is supported for DDP only; {_USE_DDP}"


def _why_ddp_refused(strategy: DDPStrategy) -> str | None:
    if strategy._start_method != "popen":
        return (
            f"start_method='{strategy._start_method}' trains in copies of this process, and Lightning brings back the "
            "weights that the model in the parent process already has: everything that grew would be lost without a "
            f"word. In a script {_USE_DDP}; in a notebook use devices=1"
        )
    if strategy._model_averaging_period is not None:
        return (
            "with model averaging (post-local SGD) the ranks' weights differ on purpose between averages, so that no "
            "decision holds for all of them; leave model_averaging_period out"
        )
    return None


def _why_sharding_refused(strategy: ModelParallelStrategy) -> str | None:
    if strategy._tensor_parallel_size not in ("auto", 1) or strategy.device_mesh["tensor_parallel"].size() > 1:
        return (
            "with tensor parallelism the ranks of a group see the same batch but parts of each activation, and a child "
            "needs whole ones; set tensor_parallel_size=1"
        )
    return None


def require_whole_optimizers(optimizers: Sequence[Any]) -> None:
    """Check that every rank holds the whole state of the optimizer.

    Raises:
        ConfigError: an optimizer keeps parts of its state on other ranks, or averages weights by itself.
    """
    for optimizer in optimizers:
        if any(base.__name__ in _DIVIDED for base in type(optimizer).__mro__):
            raise ConfigError(
                f"{type(optimizer).__name__} does not keep the same state on every rank, so that children cannot join "
                "or leave it; use the optimizer that it wraps."
            )
