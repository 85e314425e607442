"""Train a network whose children are there from the first step: what a recipe asks for."""

from collections.abc import Sequence
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from esper.kasmina.wrapper import MorphableModel
from esper.leyline.errors import ConfigError
from esper.tolaria.module import TolariaModule
from esper.tolaria.planted import Grown
from esper.tolaria.planting import check_children, plant_all


@final
class FromStart(Callback):
    """Plants children before training starts, as ordinary parts of the network that train with it.

    Each child is at full strength from the first step; like any child it starts without effect. No gate judges it.
    `esper recipe RUN` writes the settings.

    Args:
        children: one entry per child: `site` (module path), `slot` (its name there), `blueprint` (name, or the graph
            itself), `reads`, `dims`, `shape` (of the site), `start` and `width` (of its chunk; `width: null` for the
            whole layer), `init_seed`.

    Raises:
        ConfigError: an entry lacks a key or has one too many.

    Example:
        >>> FromStart(children=[{"site": "layers.2"}])
        Traceback (most recent call last):
        ...
        esper.leyline.errors.ConfigError: child 0 lacks blueprint, dims, ...
    """

    def __init__(self, *, children: Sequence[dict[str, Any]]) -> None:
        """Check the entries; the children are made when the model is known."""
        check_children(children)
        self.children = [dict(child) for child in children]
        self.grown: Grown | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plant the children, once.

        Raises:
            ConfigError: the model has no such site, or a blueprint does not fit it.
        """
        if not any(module is self.grown for module in pl_module.modules()):
            self.grown = plant_all(host_of(pl_module), self.children)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the module's optimizers train the children.

        Raises:
            ConfigError: they do not.
        """
        assert self.grown is not None
        trained = {id(p) for optimizer in trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
        if any(p.requires_grad and id(p) not in trained for p in self.grown.parameters()):
            raise ConfigError(
                f"no optimizer of {type(pl_module).__name__} trains the children; configure_optimizers must give it "
                "self.parameters(), or those of the submodule that holds all sites."
            )


def host_of(module: LightningModule) -> nn.Module:
    """Return the network in which a run grows, as the `Tamiyo` callback finds it."""
    wrapped = next((m for m in module.modules() if isinstance(m, MorphableModel)), None)
    if wrapped is not None:
        return wrapped.host
    return module.network if isinstance(module, TolariaModule) else module
