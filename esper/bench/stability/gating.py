"""Teaches the gates of children to tell two domains apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.bench.stability.hosts import NEW, ORIGINAL, domain
from esper.kasmina.wrapper import MorphableModel

GATE: Final = "router"
"""Node of a gated blueprint whose result the gate is the sigmoid of."""
WINDOWS, STEPS, LR = 192, 120, 1e-2
"""Training windows of each domain that a new gate learns from, its steps, and their rate."""

_BATCH: Final = 32


def told_apart(gate: Tensor, new: int) -> Tensor:
    """Return how badly a gate tells the domains apart: it is to be open for the first windows, shut for the rest.

    Both domains weigh the same, however many windows each has.

    Args:
        gate: what the gate is before its sigmoid.
        new: windows of the new domain.

    Shapes:
        gate: `[B, T, 1]`.

    Example:
        >>> round(float(told_apart(torch.zeros(3, 2, 1), 2)), 4)
        0.6931
    """
    return (F.softplus(-gate[:new]).mean() + F.softplus(gate[new:]).mean()) / 2


@contextmanager
def gates(*children: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the gates of children are before their sigmoid; those without a gate give nothing."""
    seen: list[Tensor] = []
    routers = [child.get_submodule(GATE) for child in children if hasattr(child, GATE)]
    hooks = [router.register_forward_hook(lambda module, args, out: seen.append(out)) for router in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def teach(network: MorphableModel, child: nn.Module, seed: int) -> None:
    """Let the gate of a child in TRAINING learn the domains, before the child has any effect; the rest of it rests.

    Args:
        network: runs the windows, so that the child reads what it will read.
        child: the child.
        seed: of the windows and of their order.
    """
    read = {name: _read(network, child, name, seed) for name in (NEW, ORIGINAL)}
    optimizer = torch.optim.AdamW(child.parameters(), lr=LR)
    order = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        chosen = torch.randperm(WINDOWS, generator=order)[:_BATCH]
        with gates(child) as seen:
            child(torch.cat([read[NEW][chosen], read[ORIGINAL][chosen]]))
        optimizer.zero_grad()
        told_apart(seen[0], _BATCH).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    child.zero_grad()


def _read(network: MorphableModel, child: nn.Module, name: str, seed: int) -> Tensor:
    """Return what the child reads in the training windows of a domain, [WINDOWS, T, D]."""
    seen: list[Tensor] = []
    hook = child.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for x, _ in domain(name, steps=WINDOWS // _BATCH, seed=seed, batch=_BATCH).train_dataloader():
        # A child in TRAINING runs where gradients are on only.
        network(x)
    hook.remove()
    return torch.cat(seen)
