"""What a parameter buys on a new domain: one grafted child, low-rank adapters everywhere, and full fine-tuning."""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from esper.bench.rows import Row
from esper.bench.stability.grafts import CHILDREN, objectives
from esper.bench.stability.hosts import NEW, domain, report_loss, trained
from esper.bench.stability.planting import Planter

FULL, LORA = "full", "lora"
POINTS: Final = 8
"""How often full fine-tuning is measured on its way."""
SHARES: Final = (0.25, 0.5, 0.75)
"""Gains at which sizes are compared, as shares of what full fine-tuning gains."""


class Arm(NamedTuple):
    """A way to spend parameters.

    Args:
        kind: blueprint of the children; empty for none.
        targets: globs over the places of the children.
        everywhere: whether each place has one, or the first alone.
        sizes: ranks of each adapter, or parameters of the child.
        lr: rate of AdamW, chosen on the decision part of seed 0 at one size; docs/bench-stability.md says among which.
        about: what it is, for people.
    """

    kind: str
    targets: tuple[str, ...]
    everywhere: bool
    sizes: tuple[int, ...]
    lr: float
    about: str


_CHILD: Final = (250, 500, 1000, 2000, 4000, 8000, 16000)
_CONV: Final = (700, *_CHILD[2:])
"""Its smallest child takes some 500."""
_LINEAR: Final = ("*.attn.qkv", "*.attn.proj", "*.ffn.up", "*.ffn.down")
ARMS: Final = {
    FULL: Arm("", ("*.after_attn",), False, (0,), 3e-3, "every weight of the host is trained"),
    LORA: Arm("BP-PROJ-LORA", _LINEAR, True, (1, 2, 4, 8), 1e-2, "adapters of rank 1 to 8 at every linear layer"),
    "gelu": Arm(
        "BP-MLP-GELU", ("blocks.0.after_attn",), False, _CHILD, 1e-2, "one BP-MLP-GELU behind the first attention"
    ),
    "conv": Arm("BP-CONV-CAUSAL", ("blocks.0.after_attn",), False, _CONV, 1e-2, "one BP-CONV-CAUSAL behind it"),
}


class Point(NamedTuple):
    """What so many trained parameters gained.

    Args:
        params: trained parameters.
        gain: by how much the loss on the new domain fell, in nats per byte.
    """

    params: float
    gain: float


def row(config: dict[str, Any], folder: Path) -> Row:
    """Adapt a trained host to the new domain with one arm, once for each size.

    Args:
        config: `arm`, `steps`, `seed`, `host_steps`, `sizes` of the host, `few` for two sizes alone.
        folder: where trained hosts are kept.
    """
    torch.set_num_threads(1)
    arm, seed = ARMS[config["arm"]], config["seed"]
    host = trained(folder, steps=config["host_steps"], seed=seed, **config["sizes"])
    found: list[dict[str, float]] = []
    before = report_loss(host, domain(NEW, steps=1, seed=seed))
    for size in arm.sizes[:2] if config["few"] else arm.sizes:
        found += _adapted(copy.deepcopy(host), arm, size, config, before)
    return {"points": found, "before": before, "host_params": sum(p.numel() for p in host.parameters())}


def _adapted(host: nn.Module, arm: Arm, size: int, config: dict[str, Any], before: float) -> list[dict[str, float]]:
    steps, seed = config["steps"], config["seed"]
    data = domain(NEW, steps=1, seed=seed)
    planter = Planter(host, arm.targets, data.parts.decision[0][0][None], frozen=bool(arm.kind), lr=arm.lr)
    for path in planter.sites[: None if arm.everywhere else 1] if arm.kind else []:
        shape = host.get_submodule(path)
        planter.plant(path, arm.kind, _room(shape, size) if arm.everywhere else size, seed=seed)
    losses = objectives(NEW, CHILDREN["plain"], host, steps, seed + 2000)
    trains = planter.added or sum(p.numel() for p in host.parameters())
    found, points = [], 1 if arm.kind else POINTS
    for number in range(points):
        planter.train(losses, steps // points)
        gain = before - report_loss(planter.network, data)
        found.append({"params": trains, "gain": gain, "steps": steps // points * (number + 1)})
    planter.close()
    return found


def _room(linear: nn.Module, rank: int) -> int:
    """Return the parameters of an adapter of a rank."""
    assert isinstance(linear, nn.Linear)
    return rank * (linear.in_features + linear.out_features)


class Size(NamedTuple):
    """The fewest trained parameters that reach a gain.

    Args:
        params: how many; not a number where no size that was tried reaches it.
        at_most: whether the smallest size that was tried reaches it already, so that fewer may do.
    """

    params: float
    at_most: bool = False


def size_at(points: Sequence[Point], gain: float) -> Size:
    """Return the fewest parameters that reach a gain, interpolated on the logarithm of the parameters.

    Args:
        points: what each size gained.
        gain: wanted.

    Example:
        >>> size_at([Point(100, 0.1), Point(10000, 0.3)], 0.2)
        Size(params=1000.0, at_most=False)
    """
    ordered = sorted(points)
    if ordered and ordered[0].gain >= gain:
        return Size(ordered[0].params, at_most=True)
    for (low, less), (high, more) in pairwise(ordered):
        if less < gain <= more:
            share = (gain - less) / (more - less)
            return Size(round(math.exp(math.log(low) + share * math.log(high / low)), 6))
    return Size(math.nan)
