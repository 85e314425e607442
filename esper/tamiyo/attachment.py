"""How seeds hang on a LightningModule, and how they are kept out of its optimizer's sight."""

from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esper.kasmina.bank import SeedBank
from esper.kasmina.config import KasminaConfig
from esper.kasmina.sites import Targets
from esper.kasmina.wrapper import MorphableModel
from esper.leyline.errors import ConfigError
from esper.tolaria.module import TolariaModule

BANK_NAME = "esper"
_CLIPPING = "configure_gradient_clipping"
_IGNORES = "_ddp_params_and_buffers_to_ignore"


class Attachment:
    """A seed bank inside a LightningModule.

    Args:
        module: the LightningModule.
        morphable: host and seeds.
        parent: module that holds the bank.
        name: attribute of the bank in its parent.
    """

    def __init__(self, module: LightningModule, morphable: MorphableModel, parent: nn.Module, name: str) -> None:
        """Remember where the bank hangs."""
        self.module, self.morphable, self.parent, self.name = module, morphable, parent, name
        self.bank = morphable.bank
        self._own_clipping = False
        self._user_ignores = tuple(getattr(module, _IGNORES, ()))

    @classmethod
    def find_or_make(cls, module: LightningModule, config: KasminaConfig, targets: Targets) -> "Attachment":
        """Use the seeds of a model wrapped by hand inside the module, or attach new ones.

        The host is the whole module, or the network inside a `TolariaModule`: the grown network is then saved without
        its training code.
        """
        for parent in module.modules():
            if isinstance(parent, MorphableModel):
                return cls(module, parent, parent, "bank")
        host = module.network if isinstance(module, TolariaModule) else module
        bank = getattr(module, BANK_NAME, None)
        if not isinstance(bank, SeedBank):
            bank = SeedBank(host, config, targets)
            module.add_module(BANK_NAME, bank)
        return cls(module, MorphableModel(host, bank), module, BANK_NAME)

    def hide(self) -> None:
        """Take the bank out of the module tree, so that `parameters()` shows the host alone; hooks keep working."""
        self.parent._modules.pop(self.name, None)

    def show(self) -> None:
        """Put the bank back."""
        self.parent._modules[self.name] = self.bank

    def keep_from_wrapper(self) -> None:
        """Keep the bank out of what a distributed wrapper will reduce and broadcast: Esper averages it by itself."""
        vars(self.module)[_IGNORES] = [*self._user_ignores, *self._own_names()]

    def follow_in_wrapper(self, wrapper: nn.Module | None) -> None:
        """Do the same for what has grown since, in the wrapper that is at work."""
        if isinstance(wrapper, DistributedDataParallel):
            wrapper.parameters_to_ignore = {*self._user_ignores, *self._own_names()}

    def _own_names(self) -> list[str]:
        own = {id(t) for t in (*self.bank.parameters(), *self.bank.buffers())}
        named = (*self.module.named_parameters(), *self.module.named_buffers())
        return [name for name, tensor in named if id(tensor) in own]

    def finish_probing(self) -> dict[str, str]:
        """End the probing of every layer that a batch has passed through; return what was refused just now."""
        refused = {}
        for layer in self.bank.all_layers():
            if layer.probing:
                reason = layer.finish_probe()
                if reason is not None:
                    refused[layer.path] = reason
        self.bank.refused.update(refused)
        return refused

    def refuse_replaced(self) -> None:
        """Refuse sites whose module another has taken the place of since: the hook of the old one never runs.

        Raises:
            ConfigError: something has grown there, which would be lost without a word.
        """
        for layer in self.bank.all_layers():
            now = self.morphable.host.get_submodule(layer.path)
            if now is layer.site:
                continue
            layer.refusal = (
                f"{type(now).__name__} has taken its place since seeds were attached, as sync_batchnorm does"
            )
            if layer.grafts:
                raise ConfigError(
                    f"{layer.path!r} carries a child, but {layer.refusal}; train on without sync_batchnorm."
                )

    def replace_clipping(self, clipping: Any) -> None:
        """Clip host and children apart for the length of a fit."""
        vars(self.module)[_CLIPPING] = clipping
        self._own_clipping = True

    def restore_clipping(self) -> None:
        """Give the module its own clipping back."""
        if self._own_clipping:
            del vars(self.module)[_CLIPPING]
            self._own_clipping = False
