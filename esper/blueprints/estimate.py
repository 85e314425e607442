"""What a child costs at a place beside its parameters: work, time and memory, before it is built."""

from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from types import MappingProxyType
from typing import Final, NamedTuple

from esper.blueprints.ir import BlueprintIR
from esper.blueprints.plan import Plan, make_plan
from esper.blueprints.site import Layout, SiteShape
from esper.leyline.errors import BlueprintError

REFERENCE: Final[Mapping[Layout, tuple[int, int]]] = MappingProxyType(
    {"btd": (64, 128), "bd": (64, 1), "bchw": (64, 128)}
)
"""Features and positions of the places at which manifests state a latency and tables a cost."""

_MACS_PER_NUMBER: Final = 32
"""Multiply-accumulates that take about as long as reading one number, on a processor core."""

_TRAINING_BYTES: Final = 16
"""Bytes of a parameter in training: weight, gradient and the two moments of Adam, in float32."""


class Estimate(NamedTuple):
    """Price of a child at a place.

    Args:
        params: exact number of parameters.
        macs: multiply-accumulates of one sample.
        latency_ms: forward time of 8 samples, in milliseconds.
        memory_mb: memory in training, in MiB: parameters with their gradients and moments, and what one sample leaves
            behind for the backward pass.
    """

    params: int
    macs: int
    latency_ms: float
    memory_mb: float


def estimate(
    ir: BlueprintIR, site: SiteShape, dims: Mapping[str, int] | None = None, *, latency_ms: float = 0.0
) -> Estimate:
    """Return the price of a blueprint at a place.

    The time is `latency_ms * work / work at the reference`, where work is the numbers that the operations read plus
    1/32 of the multiply-accumulates: a first guess, until the kernel has been measured.

    Args:
        ir: the blueprint.
        site: the place.
        dims: chosen sizes.
        latency_ms: forward time of 8 samples at the blueprint's reference place, in milliseconds.

    Raises:
        BlueprintError: as `make_plan`.

    Example:
        >>> from esper.blueprints.library import load_library
        >>> gelu = load_library()["BP-MLP-GELU"]
        >>> estimate(gelu.ir, SiteShape("btd", 64, 64, 128), latency_ms=0.5).latency_ms
        0.5
    """
    plan = make_plan(ir, site, dims)
    ratio = _work(plan) / _reference_work(ir)
    memory = _TRAINING_BYTES * plan.params + 4 * _numbers(plan)
    return Estimate(plan.params, plan.macs, latency_ms * ratio, memory / 2**20)


def reference(ir: BlueprintIR) -> SiteShape | None:
    """Return the place of 64 features at which a blueprint's cost is shown, the first that it fits; None if none does.

    Example:
        >>> from esper.blueprints.library import load_library
        >>> reference(load_library()["BP-CANON"].ir)
        SiteShape(layout='btd', d_in=64, d_out=64, tokens=128, kind='block')
    """
    for layout in ir.layouts:
        width, tokens = REFERENCE[layout]
        site = SiteShape(layout, width, width, tokens, ir.site_kinds[-1] if ir.site_kinds else "block")
        with suppress(BlueprintError):
            make_plan(ir, site)
            return site
    return None


@lru_cache(maxsize=512)
def _reference_work(ir: BlueprintIR) -> float:
    site = reference(ir)
    return _work(make_plan(ir, site)) if site is not None else float("inf")


def _work(plan: Plan) -> float:
    return _numbers(plan) + plan.macs / _MACS_PER_NUMBER


def _numbers(plan: Plan) -> int:
    return sum(value.width * value.tokens for step in plan.steps for value in step.inputs)
