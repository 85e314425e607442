"""Blueprints and specs that several tests of this folder share."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from esper.blueprints import STANDARD, BlueprintIR, build, load_library, parse_ir
from esper.blueprints.build import Child
from esper.blueprints.hashing import canonical_json
from esper.leyline.artifacts import KernelSpec
from esper.tezzeret.specs import blueprint_of, input_shape, site_of

SHAPES = {"btd": (12, 16, 6), "bd": (12, 16, 1), "bchw": (6, 8, 20)}


def text(ir: BlueprintIR) -> str:
    return canonical_json(ir.model_dump(mode="json")).decode()


def spec(name: str = "BP-MLP-GELU", layout: str = "btd", reads: str = "", **fields: Any) -> KernelSpec:
    """The kernel of a blueprint of the library at a small site."""
    ir = load_library()[name].ir
    ir = ir.reading(reads) if reads else ir  # type: ignore[arg-type]
    d_in, d_out, tokens = SHAPES[layout]
    given = {"layout": layout, "d_in": d_in, "d_out": d_out, "tokens": tokens, "kind": "block"}
    return KernelSpec.model_validate({"ir": text(ir), **given, **fields})


def library() -> Iterator[KernelSpec]:
    """The standard blueprints, in every layout and placement that they permit."""
    for name in STANDARD:
        ir = load_library()[name].ir
        for reads in (ir.reads, *ir.also_reads):
            for layout in ir.layouts:
                yield spec(name, layout, reads)


def label(one: KernelSpec) -> str:
    ir = blueprint_of(one)
    return f"{ir.name}-{one.layout}-{ir.reads}"


def graph(*nodes: str, output: str = "", **fields: Any) -> KernelSpec:
    """A blueprint written as `id op inputs key=value...`, at a site of 8 features."""
    made = [_node(line) for line in nodes]
    given = {"name": "BP-TEST", "layouts": ("bd",), "nodes": made, "output": output or made[-1]["id"]}
    return KernelSpec(ir=text(parse_ir({**given, **fields})), layout="bd", d_in=8, d_out=8, tokens=1, kind="block")


def _node(line: str) -> dict[str, Any]:
    name, op, inputs, *attrs = line.split()
    pairs = (attr.split("=") for attr in attrs)
    values = {key: int(value) if value.isdigit() else {"false": False}.get(value, value) for key, value in pairs}
    return {"id": name, "op": op, "inputs": tuple(inputs.split(",")), "attrs": values}


def grown(one: KernelSpec, seed: int = 0) -> Child:
    """A child away from its birth."""
    child = build(blueprint_of(one), site_of(one), one.dims, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return child.to(getattr(torch, one.dtype))


def features(one: KernelSpec, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    shape = input_shape(blueprint_of(one), site_of(one), batch)
    return torch.randn(shape, generator=generator).to(getattr(torch, one.dtype))


STUCK = {
    "zero-product": graph("a linear input out=8 init=zero", "b linear input out=8 init=zero", "p mul a,b"),
    "zero-chain": graph("a linear input out=8 init=zero", "b linear a out=8 init=zero"),
    "dead-relu": graph("a linear input out=8 init=zero", "r act a fn=relu"),
}
"""Graphs that look right and can never learn, by the rule that refuses them."""
