"""From symbols to numbers: the sizes of one blueprint at one site."""

from collections.abc import Mapping
from typing import NamedTuple

from esper.blueprints.expr import evaluate
from esper.blueprints.ir import BlueprintIR, DimSpec
from esper.blueprints.site import SiteShape
from esper.leyline.errors import BlueprintDoesNotFit, BlueprintError


class DimRange(NamedTuple):
    """Values that a size may take: from `low` to `high` in steps of `step`."""

    low: int
    high: int
    step: int

    def snap(self, value: int) -> int:
        """Return the nearest permitted value that is not above `value`, or the least."""
        return min(self.high, max(self.low, value // self.step * self.step))


def width_read(ir: BlueprintIR, site: SiteShape) -> int:
    """Return the number of features that the child reads at this site."""
    return site.d_in if ir.reads == "input" else site.d_out


def site_symbols(ir: BlueprintIR, site: SiteShape) -> dict[str, int]:
    """Return the values of `d`, `d_in`, `d_out` and `tokens`.

    Raises:
        BlueprintDoesNotFit: a width or the number of tokens is not positive.
    """
    width = width_read(ir, site)
    if min(width, site.d_out, site.tokens) < 1:
        raise BlueprintDoesNotFit(f"{ir.name}: the site's widths and tokens must be positive; it is {site}.")
    return {"d": width, "d_in": width, "d_out": site.d_out, "tokens": site.tokens}


def dim_range(ir: BlueprintIR, site: SiteShape, name: str) -> DimRange:
    """Return the values that a size may take at this site.

    Raises:
        BlueprintDoesNotFit: there are none.
    """
    spec = ir.dims[name]
    step = spec.multiple_of
    low = -(-spec.min // step) * step
    high = evaluate(spec.max, site_symbols(ir, site)) // step * step
    if low > high:
        raise BlueprintDoesNotFit(f"{ir.name}: size {name!r} must be at least {low} but may be at most {high} here.")
    return DimRange(low, high, step)


def resolve_dims(ir: BlueprintIR, site: SiteShape, given: Mapping[str, int] | None) -> dict[str, int]:
    """Return the value of every size: as given where free, else by its default.

    A default is moved into the permitted range; a value given outside it is an error.

    Raises:
        BlueprintError: a name is not one of the free sizes.
        BlueprintDoesNotFit: a value is out of range at this site.
    """
    given = given or {}
    _check_free(ir, given)
    symbols, dims = site_symbols(ir, site), {}
    for name, spec in ir.dims.items():
        if spec.free:
            dims[name] = _free(ir, site, name, given.get(name))
    for name, spec in ir.dims.items():
        if not spec.free:
            dims[name] = _within(ir, site, name, evaluate(spec.default, symbols | _only_free(ir.dims, dims)))
    return dims


def _check_free(ir: BlueprintIR, given: Mapping[str, int]) -> None:
    free = [name for name, spec in ir.dims.items() if spec.free]
    for name, value in given.items():
        if name not in free:
            raise BlueprintError(f"{ir.name} has no free size {name!r}; free sizes: {', '.join(free) or 'none'}.")
        if isinstance(value, bool) or not isinstance(value, int):
            raise BlueprintError(f"{ir.name}: size {name!r} must be an integer, not {value!r}.")


def _only_free(specs: Mapping[str, DimSpec], dims: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in dims.items() if specs[name].free}


def _free(ir: BlueprintIR, site: SiteShape, name: str, given: int | None) -> int:
    if given is not None:
        return _within(ir, site, name, given)
    default = evaluate(ir.dims[name].default, site_symbols(ir, site))
    return dim_range(ir, site, name).snap(default)


def _within(ir: BlueprintIR, site: SiteShape, name: str, value: int) -> int:
    low, high, step = dim_range(ir, site, name)
    if not low <= value <= high or value % step:
        allowed = f"{low} to {high}" + (f" in steps of {step}" if step > 1 else "")
        raise BlueprintDoesNotFit(f"{ir.name}: size {name!r} is {value}; allowed here: {allowed}.")
    return value
