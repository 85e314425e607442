"""Plants children one after another by the product's own commands, and trains between them."""

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor, nn

from esper.blueprints import load_library
from esper.kasmina.config import KasminaConfig
from esper.kasmina.library_store import LibraryKernelStore
from esper.kasmina.steps import SeedStepper
from esper.kasmina.wrapper import MorphableModel, wrap
from esper.kasmina.writer import Moment, SeedWriter
from esper.leyline.commands import KasminaControlCommand
from esper.leyline.errors import ConfigError
from esper.leyline.ids import SeedId
from esper.leyline.states import Reason, SeedCommand
from esper.tamiyo import observe
from esper.tamiyo.gate import command_for
from esper.tamiyo.menu import Menu, Offer, Room, germinate
from esper.tolaria.optimizers import sync_optimizer

_BEGIN: Final = (SeedCommand.LOAD, SeedCommand.TRAIN)
_GRAFT: Final = (SeedCommand.GRAFT,)
_END: Final = (SeedCommand.STABILIZE, SeedCommand.EVALUATE, SeedCommand.FINE_TUNE, SeedCommand.FOSSILIZE)


class Planter:
    """A wrapped host, its optimizer, and whoever plants in it.

    Children walk the life cycle by the one writer, with the ramp of the settings. The gate is not asked: what every
    graft does is to be seen, not what is left when the poor ones are gone.

    Args:
        host: the network; its weights keep every bit if it is frozen.
        targets: globs over the places that may grow.
        example: one batch, which tells the shapes.
        frozen: whether the host's own weights rest.
        lr: rate of AdamW, of host and children.
    """

    def __init__(
        self, host: nn.Module, targets: tuple[str, ...], example: Tensor, *, frozen: bool, lr: float = 1e-3
    ) -> None:
        """Attach seeds and look at the places."""
        self.network: MorphableModel = wrap(host, KasminaConfig(telemetry_every=0), targets=list(targets))
        self.host = host.requires_grad_(not frozen)
        with torch.no_grad():
            self.network.eval()(example)
        for layer in self.network.bank.all_layers():
            layer.finish_probe()
        self.network.train()
        self.optimizer = torch.optim.AdamW(host.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
        self.menu, self.stepper = Menu(load_library()), SeedStepper(self.network.bank)
        self.writer = SeedWriter(self.network.bank, LibraryKernelStore(), lambda event: None)
        self.step, self.under_way = 0, list[str]()

    @property
    def sites(self) -> list[str]:
        """Paths of the places that may grow, in order."""
        return [site.path for site in observe.sites(self.network.bank)]

    @property
    def added(self) -> int:
        """Parameters of all children."""
        return self.network.bank.added_parameters()

    def plant(
        self, path: str, blueprint: str, params: int, *, seed: int, taught: Callable[[nn.Module], None] | None = None
    ) -> Offer:
        """Plant the largest child of a kind within so many parameters, and begin its ramp.

        Args:
            path: of the place.
            blueprint: the kind.
            params: most parameters.
            seed: of its weights.
            taught: what is done to the child in TRAINING, where it has no effect yet.

        Raises:
            ConfigError: it does not fit there.
        """
        found = next(site for site in observe.sites(self.network.bank) if site.path == path)
        slot = self.network.bank.free_slot(path).slot
        offer = self.menu.offer(found._replace(slot=slot, closed=frozenset()), blueprint, Room(params))
        if offer is None:
            raise ConfigError(f"{blueprint} does not fit {path} within {params} parameters.")
        self._apply([germinate(offer, seed=seed), *self._orders(offer.seed_id, _BEGIN)])
        graft = self.network.bank.graft(SeedId.parse(offer.seed_id))
        assert graft is not None
        if taught is not None:
            taught(graft.child)
        self._apply(self._orders(offer.seed_id, _GRAFT))
        sync_optimizer(self.optimizer, (), self.network.bank)
        self.under_way.append(offer.seed_id)
        return offer

    def train(self, losses: Iterator[Callable[[nn.Module], Tensor]], steps: int) -> None:
        """Make training steps.

        Args:
            losses: for each step, what gives the network's loss.
            steps: how many.
        """
        for _ in range(steps):
            self.stepper.begin(self.step)
            loss = next(losses)(self.network)
            # In the first step of the first child alpha is 0: of a frozen host nothing asks for a gradient yet.
            if loss.requires_grad:
                self._update(loss)
            self.step += 1
            self.stepper.end(float(loss.detach()))

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.stepper.observe_gradients()
        for part in (self.host, self.network.bank) if self.added else (self.host,):
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        self.optimizer.step()

    def keep(self) -> None:
        """End the life cycle of the children under way: they are fossils now, and train on as fossils do."""
        for seed_id in self.under_way:
            self._apply(self._orders(seed_id, _END))
        self.under_way = []

    def close(self) -> None:
        """Stop the thread that builds kernels."""
        self.writer.store.close()

    def _apply(self, commands: list[KasminaControlCommand]) -> None:
        done = self.writer.apply(commands, Moment("stability", 0, self.step))
        assert len(done) == len(commands), "a child could not be planted"

    def _orders(self, seed_id: str, verbs: tuple[SeedCommand, ...]) -> list[KasminaControlCommand]:
        return [command_for(seed_id, verb, Reason.REQUESTED) for verb in verbs]
