"""Folding an affine child into its linear host."""

from copy import deepcopy

import torch
from torch import Tensor

from esper.blueprints.build import Child
from esper.blueprints.dims import width_read
from esper.leyline.errors import BlueprintDoesNotFit, BlueprintError


@torch.no_grad()
def merged_linear(
    child: Child, weight: Tensor, bias: Tensor | None, alpha: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of the linear layer that computes host and child together.

    With `y = W x + b` and the child's affine map `A z + c`, where z is what the child reads:

    - `zero_residual` reading the output: `W' = W + alpha A W`, `b' = b + alpha (A b + c)`;
    - `zero_residual` reading the input: `W' = W + alpha A`, `b' = b + alpha c`;
    - `identity`: `W' = W + alpha (A W - W)`, `b' = b + alpha (A b + c - b)`.

    Sums are taken in float64 on the CPU and rounded once. Several children that read the same host each get the host's
    own weight and bias, and their changes add up.

    Args:
        child: built from a mergeable blueprint.
        weight: the host's weight, or the rows of it that the child's chunk covers: (d_out, d_in).
        bias: the host's bias (d_out,), or None.
        alpha: strength of the graft, 0 to 1.

    Returns:
        New tensors in the precision of the old; no bias if there was none and none is needed.

    Raises:
        BlueprintError: the blueprint is not mergeable.
        BlueprintDoesNotFit: the weight's shape is not that of the child's site.
    """
    _check(child, weight)
    W = weight.cpu().double()
    b = torch.zeros(len(W), dtype=torch.float64) if bias is None else bias.cpu().double()
    A, c = _affine_map(child)
    change_W, change_b = (A, c) if child.ir.reads == "input" else (A @ W, A @ b + c)
    if child.ir.initial == "identity":
        change_W, change_b = change_W - W, change_b - b
    strength = float(alpha)
    merged_W, merged_b = W + strength * change_W, b + strength * change_b
    if bias is None and not merged_b.any():
        return merged_W.to(weight), None
    return merged_W.to(weight), merged_b.to(weight if bias is None else bias)


def _affine_map(child: Child) -> tuple[Tensor, Tensor]:
    exact = deepcopy(child).cpu().double()
    width = width_read(child.ir, child.site)
    basis = torch.cat([torch.zeros(1, width), torch.eye(width)]).double()
    offset, *columns = exact(basis).unbind()
    return torch.stack(columns, dim=1) - offset[:, None], offset


def _check(child: Child, weight: Tensor) -> None:
    if not child.ir.mergeable:
        raise BlueprintError(f"{child.ir.full_name} is not mergeable; keep it as a module.")
    site = child.site
    if site.layout == "bchw" or tuple(weight.shape) != (site.d_out, site.d_in):
        raise BlueprintDoesNotFit(
            f"{child.ir.full_name} was built for {site}; it does not merge into a weight of {tuple(weight.shape)}."
        )
