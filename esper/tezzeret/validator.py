"""The static validator: whether an untrusted blueprint at a site may be compiled, without running any of it.

`parse_ir` refuses what is malformed: unknown operations and attributes, cycles, dead ends, over 64 nodes. This adds
what only the site tells (sizes, work, memory), compares shapes and precision with what torch infers, and refuses graphs
that look right and cannot learn. Every refusal names the node and the rule.
"""

from pathlib import Path
from typing import Final, NamedTuple

import torch

from esper.blueprints import BlueprintIR, SiteShape
from esper.blueprints.build import Child
from esper.blueprints.library import MAX_BYTES, Blueprint, read_blueprint
from esper.blueprints.op import Value
from esper.blueprints.plan import Plan, Step
from esper.leyline.artifacts import KernelSpec
from esper.leyline.errors import BlueprintDoesNotFit, BlueprintError
from esper.tezzeret.birth import check_birth
from esper.tezzeret.specs import input_shape, planned

_SAMPLES: Final = 3
_TRIED_WIDTHS: Final = (64, 48)
_TRIED_TOKENS: Final = {"btd": 16, "bd": 1, "bchw": 64}


class Bounds(NamedTuple):
    """What a child may at most be, for one sample.

    Args:
        params: parameters.
        macs: multiply-accumulates of the forward.
        activations: numbers that the forward makes, attention scores among them.
        text: characters of the blueprint's JSON.
    """

    params: int = 1 << 27
    macs: int = 1 << 36
    activations: int = 1 << 28
    text: int = MAX_BYTES


class Checked(NamedTuple):
    """A blueprint that may be compiled, and its plan at the site."""

    ir: BlueprintIR
    site: SiteShape
    plan: Plan


def check_ir(spec: KernelSpec, bounds: Bounds | None = None) -> Checked:
    """Check a blueprint at a site.

    Args:
        spec: blueprint, site, sizes and precision.
        bounds: what it may at most be; None for the defaults.

    Raises:
        BlueprintError: the blueprint is malformed or too large, or cannot learn.
        BlueprintDoesNotFit: the site cannot take it.

    Example:
        >>> from esper.blueprints import load_library
        >>> from esper.blueprints.hashing import canonical_json
        >>> ir = canonical_json(load_library()["BP-MLP-GELU"].ir.model_dump(mode="json")).decode()
        >>> check_ir(KernelSpec(ir=ir, layout="bd", d_in=4, d_out=6, tokens=1, kind="linear")).plan.params
        162
    """
    limits = bounds if bounds is not None else Bounds()
    if len(spec.ir) > limits.text:
        raise BlueprintError(f"rule size: the blueprint has {len(spec.ir)} characters; at most {limits.text} are read.")
    ir, site, plan = planned(spec)
    _check_bounds(plan, limits)
    _check_shapes(ir, site, plan, spec.dtype)
    check_birth(ir, plan)
    return Checked(ir, site, plan)


def check_file(path: Path, bounds: Bounds | None = None) -> Blueprint:
    """Read a blueprint file that somebody handed in, and check it at a typical site of each of its layouts.

    Raises:
        BlueprintError: it cannot be read, is malformed, or fails at every site; the message says why.
    """
    blueprint = read_blueprint(path)
    refusals = []
    for place in (blueprint.ir.reads, *blueprint.ir.also_reads):
        for spec in _typical(blueprint.ir.reading(place)):
            try:
                check_ir(spec, bounds)
            except BlueprintDoesNotFit as error:
                refusals.append(str(error))
            else:
                refusals.append("")
    if all(refusals):
        raise BlueprintDoesNotFit(f"{path}: it fits no typical site: {refusals[0]}")
    return blueprint


def _typical(ir: BlueprintIR) -> list[KernelSpec]:
    text, kind = ir.model_dump_json(), (ir.site_kinds or ("block",))[0]
    (d_in, d_out) = _TRIED_WIDTHS
    shapes = [(layout, width) for layout in ir.layouts for width in (d_in, d_out)]
    return [
        KernelSpec(ir=text, layout=layout, d_in=width, d_out=d_out, tokens=_TRIED_TOKENS[layout], kind=kind)
        for layout, width in shapes
    ]


def _check_bounds(plan: Plan, limits: Bounds) -> None:
    for rule, total, most, one in (
        ("params", plan.params, limits.params, [s.op.params(s.inputs) for s in plan.steps]),
        ("macs", plan.macs, limits.macs, [s.op.macs(s.inputs) for s in plan.steps]),
        ("activations", sum(map(_numbers, plan.steps)), limits.activations, list(map(_numbers, plan.steps))),
    ):
        if total > most:
            node = plan.steps[one.index(max(one))].id
            raise BlueprintError(
                f"node {node!r}: rule {rule}: it has {max(one)} of the child's {total}; at most {most} are allowed: "
                "choose smaller sizes."
            )


def _numbers(step: Step) -> int:
    """Return how many numbers an operation makes of one sample."""
    made: Value = step.op.infer(step.inputs)
    return made.width * made.tokens + step.op.scratch(step.inputs)


def _check_shapes(ir: BlueprintIR, site: SiteShape, plan: Plan, dtype: str) -> None:
    """Compare the result with torch's own inference, on tensors without memory."""
    child = Child(ir, site, plan).to(getattr(torch, dtype))
    x = torch.empty(input_shape(ir, site, _SAMPLES), dtype=getattr(torch, dtype), device="meta")
    wanted = (*x.shape[:1], site.d_out, *x.shape[2:]) if site.layout == "bchw" else (*x.shape[:-1], site.d_out)
    try:
        with torch.no_grad():
            result = child(x)
    except (RuntimeError, IndexError, ValueError) as error:
        raise BlueprintError(f"node {ir.output!r}: rule shapes: torch refuses it: {error}") from error
    if tuple(result.shape) != tuple(wanted) or result.dtype != x.dtype:
        raise BlueprintError(
            f"node {ir.output!r}: rule shapes: it returns {tuple(result.shape)} of {result.dtype}; "
            f"the site writes {tuple(wanted)} of {x.dtype}."
        )
