"""What several tests of this folder share: operations at work, children away from their birth, abler machines."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from esper.blueprints import BlueprintIR, SiteShape, build, load_library, parse_ir
from esper.blueprints.build import Child
from esper.blueprints.capabilities import CAPABILITIES, Capability, lacking
from esper.blueprints.dims import width_read

LIBRARY = load_library()
HERE = tuple(blueprint.ir.name for blueprint in LIBRARY if not lacking(blueprint.ir))
"""Blueprints that this machine can build."""


def one_op(op: str, layout: str = "btd", inputs: int = 1, **attrs: Any) -> BlueprintIR:
    """A blueprint of one operation, which reads the same value once or several times."""
    node = {"id": "it", "op": op, "inputs": ["input"] * inputs, "attrs": attrs}
    trains = op in ("decay_scan", "centred_conv", "experts")
    return parse_ir({"name": "BP-TRY", "layouts": [layout], "nodes": [node], "output": "it", "trainable": trains})


def part(op: str, width: int = 8, tokens: int = 6, layout: str = "btd", inputs: int = 1, **attrs: Any) -> nn.Module:
    """The module of one operation."""
    return build(one_op(op, layout, inputs, **attrs), SiteShape(layout, width, width, tokens), seed=0).it  # type: ignore[arg-type,return-value]


def stirred(child: nn.Module, seed: int = 1) -> nn.Module:
    """Move every parameter at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return child


def site_of(ir: BlueprintIR, width: int = 8) -> SiteShape:
    """A small place that takes a blueprint of the library."""
    tokens = {"btd": 6, "bd": 1, "bchw": 20}[ir.layouts[0]]
    return SiteShape(ir.layouts[0], width, width, tokens, (ir.site_kinds or ("block",))[0])


def grown(name: str, width: int = 8) -> Child:
    """A child of the library away from its birth."""
    ir = LIBRARY[name].ir
    child = build(ir, site_of(ir, width), seed=0)
    stirred(child)
    return child


def features(ir: BlueprintIR, batch: int = 2, width: int = 8) -> Tensor:
    """What a child reads at `site_of`."""
    site, generator = site_of(ir, width), torch.Generator().manual_seed(batch)
    shape = {"btd": (batch, 6), "bd": (batch,), "bchw": (batch,)}[site.layout]
    read = width_read(ir, site)
    return torch.randn((*shape, read, 4, 5) if site.layout == "bchw" else (*shape, read), generator=generator)


@contextmanager
def capable(monkeypatch: Any, *names: str) -> Iterator[None]:
    """A machine that offers what this one may not."""
    with monkeypatch.context() as patch:
        offered = {name: Capability("nothing", lambda: True) for name in names}
        patch.setattr("esper.blueprints.capabilities.CAPABILITIES", dict(CAPABILITIES) | offered)
        yield


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
