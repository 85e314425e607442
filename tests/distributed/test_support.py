"""Which strategies may train a model that grows; the others are refused with a reason."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

import esper
from esper.leyline.errors import ConfigError
from esper.tamiyo.support import require_supported, require_whole_optimizers, why_strategy_refused
from tests.helpers import Plain


def unbuilt(kind: type[Any]) -> Any:
    """An object of a class whose constructor needs a library or a device that is not here."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (DDPStrategy(start_method="spawn"), "parent process"),
        (DDPStrategy(start_method="fork"), "parent process"),
        (DDPStrategy(start_method="forkserver"), "in a notebook use devices=1"),
        (DDPStrategy(model_averaging_period=4), "model_averaging_period"),
        (FSDPStrategy(), "flattens the parameters"),
        (unbuilt(DeepSpeedStrategy), "engine"),
        (ModelParallelStrategy(tensor_parallel_size=2), "tensor_parallel_size=1"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_strategy_is_refused_with_a_reason(strategy: Strategy, reason: str) -> None:
    found = why_strategy_refused(strategy)
    assert found is not None and reason in found
    trainer: Any = SimpleNamespace(strategy=strategy)
    with pytest.raises(ConfigError, match=type(strategy).__name__):
        require_supported(trainer, Plain(), judges=False)


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_the_names_of_copying_strategies_lead_to_a_refusal(name: str) -> None:
    made = Trainer(strategy=name, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert "parent process" in (why_strategy_refused(made.strategy) or "")


def test_ddp_and_one_device_are_supported() -> None:
    assert why_strategy_refused(DDPStrategy(find_unused_parameters=True)) is None
    assert why_strategy_refused(SingleDeviceStrategy()) is None


def test_another_strategy_is_refused_on_several_processes_only() -> None:
    strategy = unbuilt(SingleProcessKind)
    assert why_strategy_refused(strategy) is None
    strategy.world_size = 2
    assert "DDP only" in (why_strategy_refused(strategy) or "")


class SingleProcessKind(Strategy):
    """A user's own strategy."""

    world_size = 1


SingleProcessKind.__abstractmethods__ = frozenset()


def test_a_divided_optimizer_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    with pytest.raises(ConfigError, match="ZeroRedundancyOptimizer"):
        require_whole_optimizers([unbuilt(ZeroRedundancyOptimizer)])
    require_whole_optimizers([torch.optim.SGD(Plain().parameters(), lr=0.1)])


def test_the_error_for_processes_is_ours() -> None:
    assert issubclass(esper.leyline.DistributedError, esper.EsperError)
