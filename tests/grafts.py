"""Grown models in no time: children planted by hand, with weights as if trained."""

from typing import Any

import torch
from torch import nn

import esper
from esper.blueprints import BlueprintIR, build, load_library
from esper.kasmina.graft import Graft
from esper.kasmina.record import SeedRecord
from esper.leyline.ids import SeedId
from esper.leyline.states import SeedState


def stir(module: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Move every parameter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p))


def grafted(
    model: esper.MorphableModel,
    path: str,
    blueprint: str | BlueprintIR,
    *,
    chunk: int = 0,
    reads: Any = None,
    dims: dict[str, int] | None = None,
    state: SeedState = SeedState.FOSSILIZED,
    alpha: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Graft:
    """Plant a child that already takes part, in the first free slot; the model must have seen a batch."""
    bank = model.bank
    seed = bank.free_slot(path, chunk)
    bank.open(seed)
    ir = load_library()[blueprint].ir if isinstance(blueprint, str) else blueprint
    ir = ir if reads is None else ir.reading(reads)
    site = bank.site_shape(seed)
    assert site is not None, f"{path} has seen no batch"
    child = build(ir, site, dims, seed=bank.births, dtype=dtype)
    stir(child, seed=bank.births + 1)
    record = SeedRecord(
        seed_id=str(seed), blueprint=ir.name, ir=ir.model_dump(mode="json"), reads=ir.reads, dims=child.dims,
        strategy="fixed_ramp", init_seed=bank.births, birth=bank.births, state=state.value, site=site._asdict(),
        params=sum(p.numel() for p in child.parameters()), evidence=[0.02, 0.01, 0.03, 64.0],
    )  # fmt: skip
    bank.births += 1
    bank.records[seed] = record
    graft = bank.plant(seed, child, record)
    graft.objective = "graft"
    graft.set_alpha(alpha)
    bank.arrays.set_state(bank.rows[SeedId.parse(record.seed_id)], state)
    bank.arrays.seal()
    bank.layer(path).refresh()
    model.eval()
    return graft


def wrapped(host: nn.Module, *inputs: Any, chunks: int = 1, targets: Any = None, **named: Any) -> esper.MorphableModel:
    """Wrap a host and show it one batch."""
    model = esper.wrap(host, targets=targets, seeds_per_layer=chunks).eval()
    model(*inputs, **named)
    return model
