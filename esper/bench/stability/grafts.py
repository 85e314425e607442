"""Many grafts, one after another: what becomes of the original task, and of what the network makes of it."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.bench.rows import Row
from esper.bench.stability.drift import Probe
from esper.bench.stability.gating import gates, teach, told_apart
from esper.bench.stability.hosts import BATCH, NEW, ORIGINAL, SITES, Batch, domain, mean_loss, report_loss, trained
from esper.bench.stability.planting import Planter
from esper.kasmina.wrapper import MorphableModel

PLAIN_KIND, GATED_KIND = "BP-MLP-GELU", "BP-EXPERT-CONTEXT"
UPSTREAM, DOWNSTREAM = "blocks.0.after_attn", "norm"
"""Modules of the host whose inputs are compared: the first place that may grow, and what stands behind all of them."""
PROBED: Final = 32
"""Windows of the original domain that the drift is the mean of."""
REHEARSED: Final = 2
"""Windows of each batch of eight that are of the original domain where it is rehearsed."""


class Child(NamedTuple):
    """How a child is grown.

    Args:
        kind: its blueprint.
        rehearsal: whether a quarter of each batch is of the original domain, where it learns to change nothing.
        about: what it is, for people.
    """

    kind: str
    rehearsal: bool
    about: str


CHILDREN: Final = {
    "plain": Child(PLAIN_KIND, False, f"{PLAIN_KIND}, trained on the domain alone"),
    "rehearsed": Child(PLAIN_KIND, True, f"{PLAIN_KIND}, a quarter of each batch rehearses the original domain"),
    "gated": Child(
        GATED_KIND,
        True,
        f"{GATED_KIND}, a gate that reads the context, the same rehearsal, and the gate learns the domain",
    ),
}


def row(config: dict[str, Any], folder: Path) -> Row:
    """Plant so many children one after another, and measure before the first and after each.

    Args:
        config: `domain` (`new` or `same`), `host` (`frozen` or `live`), `child`, `grafts`, `steps` of each, `share` of
            the host's parameters for each, `seed`, `host_steps`, `sizes`.
        folder: where trained hosts are kept.
    """
    torch.set_num_threads(1)
    seed, child, learned = config["seed"], CHILDREN[config["child"]], NEW if config["domain"] == NEW else ORIGINAL
    host = trained(folder, steps=config["host_steps"], seed=seed, **config["sizes"])
    before, params = copy.deepcopy(host).requires_grad_(False), sum(p.numel() for p in host.parameters())
    example = torch.stack([domain(ORIGINAL, steps=1, seed=seed).parts.decision[i][0] for i in range(PROBED)])
    planter = Planter(host, SITES, example, frozen=config["host"] == "frozen")
    measure = _Measure(planter, example, learned, seed)
    losses = objectives(learned, child, before, config["steps"] * config["grafts"], seed + 1000)
    gated = child.kind == GATED_KIND and learned == NEW
    taught = partial(teach, planter.network, seed=seed + 3000) if gated else None
    history = [measure(0)]
    for number in range(config["grafts"]):
        path = planter.sites[number % len(planter.sites)]
        planter.plant(path, child.kind, int(config["share"] * params), seed=seed + number, taught=taught)
        planter.train(losses, config["steps"])
        planter.keep()
        history.append(measure(number + 1))
    planter.close()
    return {"history": history, "host_params": params}


class _Measure:
    """Measures a network between grafts; the first drift is against what the network is now."""

    def __init__(self, planter: Planter, example: Tensor, learned: str, seed: int) -> None:
        self.planter, self.learned = planter, learned
        self.parts = {name: domain(name, steps=1, seed=seed) for name in (ORIGINAL, NEW)}
        upstream, downstream = (planter.host.get_submodule(path) for path in (UPSTREAM, DOWNSTREAM))
        self.probe = Probe(planter.network, upstream, downstream, example)

    def __call__(self, number: int) -> dict[str, float]:
        losses = {name: report_loss(self.planter.network, part) for name, part in self.parts.items()}
        told = {f"{name}_loss": loss for name, loss in losses.items()} | {"trained_loss": losses[self.learned]}
        return {"grafts": number, "params": self.planter.added, **told, **self.probe.drift()._asdict()}


def objectives(name: str, child: Child, before: nn.Module, steps: int, seed: int) -> Iterator[partial[Tensor]]:
    """Yield, for each training step, what gives the loss of a network.

    Args:
        name: of the domain that is learned.
        child: how the child is grown; only a new domain is rehearsed against the original.
        before: the host before the first graft.
        steps: how many.
        seed: of the order of the data.
    """
    rehearses = child.rehearsal and name != ORIGINAL
    own = domain(name, steps=steps, seed=seed, batch=BATCH - REHEARSED * rehearses).train_dataloader()
    if not rehearses:
        yield from (partial(_plain, batch=batch) for batch in own)
        return
    old = domain(ORIGINAL, steps=steps, seed=seed, batch=REHEARSED).train_dataloader()
    yield from (partial(_rehearsing, before, batch, known) for batch, known in zip(own, old, strict=True))


def _plain(network: nn.Module, *, batch: Batch) -> Tensor:
    return mean_loss(network, *batch)


def _rehearsing(before: nn.Module, batch: Batch, known: Batch, network: nn.Module) -> Tensor:
    """Learn the new windows, and say of the original ones what the host said before.

    `CE(new) + KL(before || now) + mean over the gates of BCE(gate, domain)`, the last where children have gates.
    """
    (x, y), (old, _) = batch, known
    assert isinstance(network, MorphableModel)
    with gates(*(graft.child for graft in network.bank.grafted().values())) as seen:
        logits = network(torch.cat([x, old]))
    with torch.no_grad():
        wanted = before(old).log_softmax(-1)
    new, kept = logits.split([len(x), len(old)])
    apart = F.kl_div(kept.log_softmax(-1).flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
    loss = F.cross_entropy(new.flatten(0, 1), y.flatten()) + apart
    return loss + torch.stack([told_apart(gate, len(x)) for gate in seen]).mean() if seen else loss
