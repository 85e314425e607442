"""Folding affine children into their linear or convolutional host."""

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from esper.blueprints.build import Child
from esper.blueprints.dims import width_read
from esper.leyline.errors import BlueprintDoesNotFit, BlueprintError


class Fold(NamedTuple):
    """A child to be folded into its host.

    Args:
        child: built from a mergeable blueprint.
        start: first output feature of its chunk.
        alpha: strength of the graft, 0 to 1.
    """

    child: Child
    start: int
    alpha: float


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
    W, b = _exact(weight, bias)
    change_W, change_b = _change(child, W, b)
    strength = float(alpha)
    merged_W, merged_b = W + strength * change_W, b + strength * change_b
    if bias is None and not merged_b.any():
        return merged_W.to(weight), None
    return merged_W.to(weight), merged_b.to(weight if bias is None else bias)


def why_not_fold(site: nn.Module, fold: Fold) -> str | None:
    """Return why a child cannot be folded exactly into this module, or None where it can.

    A host folds in float32 or float64 only: a half-precision weight would round the child away.
    """
    reason = _why_not_host(site)
    if reason is not None:
        return reason
    child = fold.child
    if not child.ir.mergeable:
        return "its blueprint is not mergeable"
    rows, bias = _rows(site, fold)
    if child.ir.reads == "input" and not _is_dense(site):
        return "it reads the input of a convolution"
    if len(rows) != child.site.d_out or (child.ir.reads == "input" and rows.shape[1] != child.site.d_in):
        return f"it was built for {child.site}, the host's weight is {tuple(rows.shape)}"
    A, c = _affine_map(child)
    if bias is None and c.any():
        return "the host has no bias to take the child's offset"
    if getattr(site, "groups", 1) > 1 and A.count_nonzero() > A.diagonal().count_nonzero():
        return "it mixes the groups of a grouped convolution"
    return None


@torch.no_grad()
def fold_into(site: nn.Module, folds: Sequence[Fold]) -> None:
    """Change the weights of a linear or convolutional module so that it computes its children too.

    The module is a `torch.nn.Linear`, a `torch.nn.Conv2d`, or the transformers library's `Conv1D`; `why_not_fold` must
    have found nothing against any child.
    """
    by_row = _by_row(site)
    W, b = _exact(by_row, _bias(site))
    total_W, total_b = torch.zeros_like(W), torch.zeros_like(b)
    for fold in folds:
        rows = slice(fold.start, fold.start + fold.child.site.d_out)
        change_W, change_b = _change(fold.child, W[rows], b[rows])
        total_W[rows] += fold.alpha * change_W
        total_b[rows] += fold.alpha * change_b
    merged = (W + total_W).to(by_row)
    weight = site.get_parameter("weight")
    weight.copy_(merged.T if _is_transposed(site) else merged.view(weight.shape))
    bias = _bias(site)
    if bias is not None:
        bias.copy_((b + total_b).to(bias))


def _why_not_host(site: nn.Module) -> str | None:
    if not (_is_dense(site) or type(site).forward is nn.Conv2d.forward):
        return f"{type(site).__name__} is no linear or convolutional layer"
    if is_parametrized(site) or type(site._parameters.get("weight")) is not nn.Parameter:
        return "the host's weight is computed from others"
    if site.get_parameter("weight").dtype not in (torch.float32, torch.float64):
        return f"the host is {site.get_parameter('weight').dtype}; folding would round, so make it float32 first"
    if site._forward_hooks or site._forward_pre_hooks:
        return "other hooks change what the host takes or returns"
    return None


def _is_dense(site: nn.Module) -> bool:
    return type(site).forward is nn.Linear.forward or _is_transposed(site)


def _is_transposed(site: nn.Module) -> bool:
    return f"{type(site).__module__}.{type(site).__name__}" == "transformers.pytorch_utils.Conv1D"


def _by_row(site: nn.Module) -> Tensor:
    """Return the weight with one row per output feature."""
    weight = site.get_parameter("weight").detach()
    return weight.T if _is_transposed(site) else weight.flatten(1)


def _bias(site: nn.Module) -> nn.Parameter | None:
    bias = site.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    return bias


def _rows(site: nn.Module, fold: Fold) -> tuple[Tensor, Tensor | None]:
    rows = slice(fold.start, fold.start + fold.child.site.d_out)
    bias = _bias(site)
    return _by_row(site)[rows], None if bias is None else bias[rows]


def _exact(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    W = weight.cpu().double()
    return W, torch.zeros(len(W), dtype=torch.float64) if bias is None else bias.cpu().double()


def _change(child: Child, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the child adds to weight and bias at full strength."""
    A, c = _affine_map(child)
    change_W, change_b = (A, c) if child.ir.reads == "input" else (A @ W, A @ b + c)
    return (change_W - W, change_b - b) if child.ir.initial == "identity" else (change_W, change_b)


@torch.no_grad()
def _affine_map(child: Child) -> tuple[Tensor, Tensor]:
    exact = deepcopy(child).cpu().double()
    width = width_read(child.ir, child.site)
    basis = torch.cat([torch.zeros(1, width), torch.eye(width)]).double()
    pixels = (1, 1) if child.site.layout == "bchw" else ()
    offset, *columns = exact(basis.view(1 + width, width, *pixels)).flatten(1).unbind()
    return torch.stack(columns, dim=1) - offset[:, None], offset


def _check(child: Child, weight: Tensor) -> None:
    if not child.ir.mergeable:
        raise BlueprintError(f"{child.ir.full_name} is not mergeable; keep it as a module.")
    site = child.site
    if site.layout == "bchw" or tuple(weight.shape) != (site.d_out, site.d_in):
        raise BlueprintDoesNotFit(
            f"{child.ir.full_name} was built for {site}; it does not merge into a weight of {tuple(weight.shape)}."
        )
