"""Shape inference: a blueprint at a site becomes an ordered list of operations of known size."""

from collections.abc import Mapping
from typing import NamedTuple

from esper.blueprints.capabilities import require_capabilities
from esper.blueprints.dims import resolve_dims, site_symbols
from esper.blueprints.graph import INPUT, Node, in_order
from esper.blueprints.ir import BlueprintIR
from esper.blueprints.op import MAX_WIDTH, Op, Value
from esper.blueprints.ops import OPS
from esper.blueprints.site import SiteShape
from esper.leyline.errors import BlueprintDoesNotFit, BlueprintError


class Step(NamedTuple):
    """One operation of a plan.

    Args:
        id: the node's id.
        op: the operation, its sizes known.
        sources: positions of its inputs: 0 is what the child reads, i + 1 the result of step i.
        inputs: shapes of its inputs.
    """

    id: str
    op: Op
    sources: tuple[int, ...]
    inputs: tuple[Value, ...]


class Plan(NamedTuple):
    """A blueprint at a site.

    Args:
        steps: in the order in which they run.
        result: position of the value that the child returns, counted as in `Step.sources`.
        dims: value of every size of the blueprint.
    """

    steps: tuple[Step, ...]
    result: int
    dims: dict[str, int]

    @property
    def params(self) -> int:
        """Exact number of parameters."""
        return sum(step.op.params(step.inputs) for step in self.steps)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return sum(step.op.macs(step.inputs) for step in self.steps)


def make_plan(ir: BlueprintIR, site: SiteShape, dims: Mapping[str, int] | None = None) -> Plan:
    """Return the blueprint's operations with every shape known.

    Args:
        ir: the blueprint.
        site: the place.
        dims: chosen values of free sizes; the others take their defaults.

    Raises:
        BlueprintError: a size is unknown or a formula fails.
        BlueprintDoesNotFit: the site's layout, family or widths, or a chosen size, cannot be taken.
    """
    _check_site(ir, site)
    sizes = resolve_dims(ir, site, dims)
    symbols = site_symbols(ir, site) | sizes
    values, places, steps = [Value(site.layout, symbols["d_in"], site.tokens)], {INPUT: 0}, []
    for node in in_order(ir.nodes):
        sources = tuple(places[name] for name in node.inputs)
        step, value = _step(node, sources, tuple(values[source] for source in sources), symbols)
        steps.append(step)
        values.append(value)
        places[node.id] = len(steps)
    result = places[ir.output]
    _check_result(ir, values[result], site)
    return Plan(tuple(steps), result, sizes)


def why_not(ir: BlueprintIR, site: SiteShape) -> str | None:
    """Return why a blueprint cannot grow at a site with its default sizes, or None where it can."""
    try:
        require_capabilities(ir)
        make_plan(ir, site)
    except BlueprintError as error:
        return str(error)
    return None


def _step(
    node: Node, sources: tuple[int, ...], inputs: tuple[Value, ...], symbols: Mapping[str, int]
) -> tuple[Step, Value]:
    try:
        op = OPS[node.op].of(node.attrs, symbols)
        value = op.infer(inputs)
    except ValueError as error:
        raise BlueprintDoesNotFit(f"node {node.id!r}: {error}") from None
    return Step(node.id, op, sources, inputs), value


def _check_site(ir: BlueprintIR, site: SiteShape) -> None:
    if site.layout not in ir.layouts:
        raise BlueprintDoesNotFit(f"{ir.name} serves layouts {', '.join(ir.layouts)}; this site is {site.layout}.")
    if ir.site_kinds and site.kind not in ir.site_kinds:
        raise BlueprintDoesNotFit(f"{ir.name} serves sites {', '.join(ir.site_kinds)}; this one is {site.kind}.")
    if max(site.d_in, site.d_out) > MAX_WIDTH:
        raise BlueprintDoesNotFit(f"{ir.name}: the site is wider than {MAX_WIDTH} features.")


def _check_result(ir: BlueprintIR, result: Value, site: SiteShape) -> None:
    if result.width != site.d_out:
        raise BlueprintDoesNotFit(
            f"{ir.name} returns {result.width} features from {ir.output!r}; the site writes {site.d_out}."
        )
    if result.tokens != site.tokens:
        raise BlueprintDoesNotFit(f"{ir.name} returns {result.tokens} positions; the site writes {site.tokens}.")
