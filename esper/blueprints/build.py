"""The interpreter: a blueprint becomes a module whose weights depend on the seed alone."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from esper.blueprints.capabilities import require_capabilities
from esper.blueprints.ir import BlueprintIR
from esper.blueprints.plan import Plan, make_plan
from esper.blueprints.site import SiteShape
from esper.leyline.errors import BlueprintDoesNotFit

MAX_PARAMS: Final = 1 << 31
"""Largest child that will be built, in parameters."""


class Child(nn.Module):
    """A network built from a blueprint; its submodules bear the ids of the blueprint's nodes.

    Args:
        ir: the blueprint.
        site: the place that it is built for.
        plan: the blueprint at that place.

    Shapes:
        x: what the child reads, in the site's layout with `d_in` or `d_out` features.
        result: the same axes with `d_out` features: a residual (`zero_residual`) or a replacement (`identity`).
    """

    def __init__(self, ir: BlueprintIR, site: SiteShape, plan: Plan, device: str = "meta") -> None:
        """Make the modules; `build` fills their weights."""
        super().__init__()
        self.ir, self.site, self.dims = ir, site, plan.dims
        self._wiring = tuple((step.id, step.sources) for step in plan.steps)
        self._result = plan.result
        for step in plan.steps:
            self.add_module(step.id, step.op.build(step.inputs, device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual or the replacement, in the precision of `x`."""
        values = [x]
        for name, sources in self._wiring:
            values.append(getattr(self, name)(*[values[source] for source in sources]))
        return values[self._result].to(x.dtype)

    def extra_repr(self) -> str:
        """Name the blueprint, where it reads and its sizes."""
        return f"{self.ir.full_name}, reads={self.ir.reads}, dims={self.dims}"


def build(
    ir: BlueprintIR,
    site: SiteShape,
    dims: Mapping[str, int] | None = None,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Child:
    """Build a child; equal arguments give bit-equal weights on every device, and no global state is touched.

    Args:
        ir: the blueprint.
        site: the place.
        dims: chosen values of free sizes; the others take their defaults.
        seed: seed of the initial weights, 0 or more.
        device: where the child lives.
        dtype: precision of its parameters.

    Raises:
        BlueprintError: a size is unknown.
        BlueprintDoesNotFit: the site cannot take the blueprint, the child would be too large, or this machine lacks
            what it needs.

    Example:
        >>> from esper.blueprints.library import load_library
        >>> site = SiteShape("bd", d_in=4, d_out=6)
        >>> child = build(load_library()["BP-MLP-GELU"].ir, site, {"h": 8}, seed=0)
        >>> child(torch.ones(2, 6)).abs().sum().item()
        0.0
    """
    require_capabilities(ir)
    plan = make_plan(ir, site, dims)
    if plan.params > MAX_PARAMS:
        raise BlueprintDoesNotFit(f"{ir.name} would have {plan.params} parameters; at most {MAX_PARAMS} are allowed.")
    return Unborn(ir, site, plan).born(seed, device, dtype)


class Unborn:
    """A child without its weights: to make the modules is what takes long.

    Args:
        ir: the blueprint.
        site: the place.
        plan: the blueprint at that place.
    """

    def __init__(self, ir: BlueprintIR, site: SiteShape, plan: Plan) -> None:
        """Make the modules, in float32 whatever the default precision of the process is at the moment."""
        self._plan = plan
        with _Unfilled():
            self._child = Child(ir, site, plan, "cpu").float()

    def born(self, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Child:
        """Fill in the weights of a seed and hand the child out; this can be done once."""
        generator = torch.Generator().manual_seed(seed)
        for step in self._plan.steps:
            step.op.reset(self._child.get_submodule(step.id), generator)
        return self._child.to(device, dtype).requires_grad_(self._child.ir.trainable)


class _Unfilled(TorchFunctionMode):
    """Leaves the weights of new modules as they are allocated: filled twice, they would also draw random numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in _FILLS or getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


_FILLS: Final = frozenset({Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_})
