"""What a child costs at a site, and the largest child that a budget allows."""

from collections.abc import Mapping
from typing import NamedTuple

from esper.blueprints.dims import DimRange, dim_range
from esper.blueprints.ir import BlueprintIR
from esper.blueprints.plan import make_plan, why_not
from esper.blueprints.site import SiteShape
from esper.leyline.errors import BlueprintDoesNotFit

__all__ = ["Cost", "cost", "fit_dims", "why_not"]


class Cost(NamedTuple):
    """Price of a child.

    Args:
        params: exact number of parameters.
        macs: multiply-accumulates of one sample, all tokens: matrix products, convolutions and attention.
            Element-wise work is not counted; one of these is two FLOPs.
    """

    params: int
    macs: int


def cost(ir: BlueprintIR, site: SiteShape, dims: Mapping[str, int] | None = None) -> Cost:
    """Return what the child costs, without building it.

    Raises:
        BlueprintError: as `make_plan`.

    Example:
        >>> from esper.blueprints.library import load_library
        >>> cost(load_library()["BP-MLP-GELU"].ir, SiteShape("btd", 64, 64, tokens=128), {"h": 16})
        Cost(params=2128, macs=262144)
    """
    plan = make_plan(ir, site, dims)
    return Cost(plan.params, plan.macs)


def fit_dims(ir: BlueprintIR, site: SiteShape, max_params: int) -> dict[str, int]:
    """Return the largest free sizes whose child has at most `max_params` parameters.

    Several free sizes first grow together in steps, then each as far as it can in the order of their names.
    A blueprint whose parameters do not grow with its sizes gets sizes that fit, though perhaps not the largest.

    Raises:
        BlueprintDoesNotFit: even the least sizes exceed the budget, or the site cannot take the blueprint.
    """
    ranges = {name: dim_range(ir, site, name) for name, spec in sorted(ir.dims.items()) if spec.free}
    dims = {name: span.low for name, span in ranges.items()}
    least = cost(ir, site, dims).params
    if least > max_params:
        raise BlueprintDoesNotFit(f"{ir.name} needs at least {least} parameters here; the budget is {max_params}.")
    dims = _grow(ir, site, max_params, dims, ranges)
    for name, span in ranges.items():
        dims = _grow(ir, site, max_params, dims, {name: span})
    return dims


def _grow(
    ir: BlueprintIR, site: SiteShape, max_params: int, dims: Mapping[str, int], ranges: Mapping[str, DimRange]
) -> dict[str, int]:
    def grown(steps: int) -> dict[str, int]:
        return {**dims, **{name: min(span.high, dims[name] + steps * span.step) for name, span in ranges.items()}}

    fits, too_far = 0, 1 + max((span.high - dims[name]) // span.step for name, span in ranges.items()) if ranges else 1
    while too_far - fits > 1:
        middle = (fits + too_far) // 2
        if _fits(ir, site, max_params, grown(middle)):
            fits = middle
        else:
            too_far = middle
    return grown(fits)


def _fits(ir: BlueprintIR, site: SiteShape, max_params: int, dims: Mapping[str, int]) -> bool:
    try:
        return cost(ir, site, dims).params <= max_params
    except BlueprintDoesNotFit:
        return False
