"""The checker of the Triton kernels: do they mean what plain torch says? For a GPU, or Triton's interpreter."""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from esper.kasmina import fused, telemetry
from esper.kasmina.blend import Addition, blend_by_torch

Blend = Callable[[Tensor, Sequence[Addition], int], Tensor]

_ROUNDING: Final = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
_SPANS: Final[tuple[tuple[tuple[int, int | None], ...], ...]] = (
    ((0, None),),
    ((0, None),) * 6,
    ((0, 3), (0, 3), (5, 6)),
)
"""First feature and width of what is added: one child, more than fit one pass, and two chunks of a layer."""
_READINGS: Final[tuple[tuple[tuple[int, ...], int], ...]] = (
    ((3, 33, 7), 1),
    ((2, 128, 75), 2),
    ((1, 9, 70), 3),
    ((1, 2, 4), 4),
    ((2, 1, 3), 1),
)
"""Readings, samples and features, and in how many chunks."""
_SHAPES: Final = (((5, 11), -1), ((4, 31, 11), -1), ((2, 11, 3, 5), 1), ((0, 11), -1))


def check_triton(device: str | torch.device = "cuda") -> None:
    """Check moments and blend, with its gradients, on odd sizes in every layout and precision.

    Args:
        device: `cuda`, or `cpu` in a process that was started with `TRITON_INTERPRET=1`.

    Raises:
        AssertionError: Triton does not run there, or a result differs from plain torch by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    for shape, chunks in _READINGS:
        rows = torch.randn(shape, generator=generator) * 3 + 1
        rows[..., 1] = 0.5
        check_moments(rows.to(device), chunks)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, dim in _SHAPES:
            for spans in _SPANS:
                y = torch.randn(shape, generator=generator).to(device, dtype)
                additions = [_addition(y, dim, i, *span, generator) for i, span in enumerate(spans)]
                check_blend(y, additions, dim)
                if y.dim() == 4:
                    check_blend(y.to(memory_format=torch.channels_last), additions, dim)


def _addition(y: Tensor, dim: int, index: int, start: int, width: int | None, generator: torch.Generator) -> Addition:
    shape = list(y.shape)
    shape[dim] = shape[dim] if width is None else width
    alpha = None if index == 1 else torch.tensor(0.3 * index - 0.5, device=y.device)
    return Addition(torch.randn(shape, generator=generator).to(y), alpha, start, width)


def check_moments(rows_LNF: Tensor, chunks: int) -> None:
    """Check the statistics that the moments of some readings lead to.

    Raises:
        AssertionError: see `check_triton`.
    """
    assert fused.runs_triton(rows_LNF), f"Triton does not run on {rows_LNF.device} in this process"
    features = rows_LNF.shape[2]
    found = telemetry.statistics_of(fused.chunk_moments(rows_LNF, chunks), features)
    expected = telemetry.statistics_of(telemetry.chunk_moments(rows_LNF, chunks), features)
    _assert_close(found, expected, 1e-4, f"the statistics of {tuple(rows_LNF.shape)} in {chunks} chunks")


def check_blend(y: Tensor, additions: Sequence[Addition], dim: int) -> None:
    """Check the blend of one output, its gradients, and in float32 the gradients of those.

    Raises:
        AssertionError: see `check_triton`.
    """
    assert fused.runs_triton(y), f"Triton does not run on {y.device} in this process"
    what = f"{len(additions)} additions to {y.dtype}{list(y.shape)} along {dim}"
    # Plain torch rounds after every operation, Triton once for four residuals.
    limit = _ROUNDING[y.dtype] * 2 * (1 + len(additions))
    found, expected = (_outcome(blend, y, additions, dim) for blend in (fused.blend, blend_by_torch))
    for name, value in expected.items():
        _assert_close(found[name], value, limit, f"{name} of {what}")
    silent = [a._replace(residual=torch.full_like(a.residual, -0.0), alpha=None) for a in additions]
    zeros = torch.full_like(y, -0.0)
    assert fused.blend(zeros, silent, dim).signbit().all(), f"{what}: a shadow changed the sign of a zero"


def _outcome(blend: Blend, y: Tensor, additions: Sequence[Addition], dim: int) -> dict[str, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (y, *(a.residual for a in additions))]
    given = [a._replace(residual=leaf) for a, leaf in zip(additions, leaves[1:], strict=True)]
    found = {"the result": (out := blend(leaves[0], given, dim)).detach()}
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    first = torch.autograd.grad(out, leaves, weight, retain_graph=True)
    found |= {f"gradient {i}": grad for i, grad in enumerate(first)}
    if y.dtype is not torch.float32:
        return found
    # The norm of a gradient as a part of the loss, as in a gradient penalty.
    again = torch.autograd.grad((out.float() ** 2).sum(), leaves, create_graph=True)
    penalty = torch.stack([grad.float().square().sum() for grad in again]).sum()
    second = torch.autograd.grad(penalty, leaves)
    return found | {f"second gradient {i}": grad for i, grad in enumerate(second)}


def _assert_close(found: Tensor, expected: Tensor, limit: float, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, expected {expected.dtype}"
    gap, size = (found.float() - expected.float()).abs(), expected.float().abs()
    assert bool((gap <= limit * (1 + size)).all()), f"{what} differs by {float(gap.max()):.2g}"
