"""From the message that names a kernel to the blueprint, the site and the plan that it means."""

import json
from math import isqrt

from esper.blueprints import BlueprintIR, SiteShape, parse_ir
from esper.blueprints.dims import width_read
from esper.blueprints.plan import Plan, make_plan
from esper.leyline.artifacts import KernelSpec
from esper.leyline.errors import BlueprintError


def blueprint_of(spec: KernelSpec) -> BlueprintIR:
    """Return the blueprint of a spec.

    Raises:
        BlueprintError: its text is not JSON, or not a blueprint.
    """
    try:
        data = json.loads(spec.ir)
    except (ValueError, RecursionError) as error:
        raise BlueprintError(f"the blueprint's text is not JSON: {error}; give canonical JSON.") from error
    return parse_ir(data)


def site_of(spec: KernelSpec) -> SiteShape:
    """Return the place that the kernel is made for."""
    return SiteShape(spec.layout, spec.d_in, spec.d_out, spec.tokens, spec.kind)


def planned(spec: KernelSpec) -> tuple[BlueprintIR, SiteShape, Plan]:
    """Return blueprint, site and plan, every size known.

    Raises:
        BlueprintError: the blueprint is malformed or does not fit.
    """
    ir, site = blueprint_of(spec), site_of(spec)
    return ir, site, make_plan(ir, site, spec.dims)


def input_shape(ir: BlueprintIR, site: SiteShape, batch: int) -> tuple[int, ...]:
    """Return the shape of what the child reads; pixels lie in the rectangle that is nearest to a square.

    Example:
        >>> from esper.blueprints import load_library
        >>> input_shape(load_library()["BP-CONV-RES"].ir, SiteShape("bchw", 3, 16, tokens=128), 5)
        (5, 16, 8, 16)
    """
    width = width_read(ir, site)
    if site.layout == "bd":
        return (batch, width)
    if site.layout == "btd":
        return (batch, site.tokens, width)
    height = next(side for side in range(isqrt(site.tokens), 0, -1) if site.tokens % side == 0)
    return (batch, width, height, site.tokens // height)
