"""Seeds by hand: probe a wrapped model, plant a child at every site, train."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import esper
from esper.blueprints import STANDARD, load_library
from esper.kasmina.library_store import LibraryKernelStore
from esper.kasmina.wrapper import MorphableModel
from esper.kasmina.writer import Moment, SeedWriter
from esper.leyline.ids import SeedId
from esper.leyline.states import SeedCommand
from esper.tamiyo import observe
from esper.tamiyo.menu import Menu, Room, germinate
from tests.compat.case import Case, call, fresh

PER_TOKEN = tuple(name for name in STANDARD if name not in ("BP-ATTN-STD", "BP-CONV-CAUSAL"))
"""Blueprints whose children compute each token alone."""

_MOST_PARAMS = 3000
_LR, _STEPS = 0.003, 3


def wrapped(case: Case) -> MorphableModel:
    """Return the case's model with probed seeds; what a batch told is in `bank.refused`."""
    model = esper.wrap(fresh(case), targets=case.targets)
    batch = case.batch(0)
    case.loss(call(model.train(), batch.inputs), batch).backward()
    with torch.no_grad():
        call(model.eval(), batch.inputs)
    for layer in model.bank.all_layers():
        reason = layer.finish_probe()
        if reason is not None:
            model.bank.refused[layer.path] = reason
    model.train().zero_grad()
    return model


def plant_everywhere(model: MorphableModel, menu: Sequence[str] | None = None) -> list[SeedId]:
    """Put a child on every site, the blueprints that fit taken in turn, at alpha 1; return their seeds."""
    store = LibraryKernelStore()
    writer = SeedWriter(model.bank, store, lambda event: None)
    planted, sites = [], observe.sites(model.bank)
    fitting = list(Menu(load_library(), menu).offers(sites, Room(_MOST_PARAMS)))
    for index, site in enumerate(sites):
        offers = [offer for offer in fitting if offer.site is site]
        assert offers, f"no blueprint fits {site}"
        command = germinate(offers[index % len(offers)], seed=index)
        further = [
            command.model_copy(update={"command": verb, "command_id": f"{command.command_id}-{verb.value}"})
            for verb in (SeedCommand.LOAD, SeedCommand.GRAFT)
        ]
        writer.apply([command, *further], Moment("run", 0, 0))
        planted.append(SeedId.parse(command.target_seed_id))
    store.close()
    strengthen(model, 1.0)
    return planted


def strengthen(model: MorphableModel, alpha: float) -> None:
    """Set the alpha of every child."""
    for seed, graft in model.bank.grafted().items():
        graft.set_alpha(alpha)
        model.bank.layer(seed.layer).refresh()


def train(model: MorphableModel, case: Case, steps: int = _STEPS) -> None:
    """Train host and children together; the last gradients stay."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=_LR)
    for step in range(steps):
        batch = case.batch(step)
        optimizer.zero_grad()
        case.loss(call(model.train(), batch.inputs), batch).backward()
        optimizer.step()


def weights(model: MorphableModel) -> dict[SeedId, list[Tensor]]:
    """Return a copy of every child's parameters."""
    return {seed: [p.detach().clone() for p in g.child.parameters()] for seed, g in model.bank.grafted().items()}


def wake(model: MorphableModel) -> None:
    """Give every child weights that plainly do something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def evaluate(model: torch.nn.Module, inputs: Any) -> Any:
    """Run a model in evaluation, without gradients."""
    with torch.no_grad():
        return call(model.eval(), inputs)
