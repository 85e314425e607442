"""Which implementation runs: one Triton pass on CUDA, and plain torch, which means the same, everywhere else.

With `TRITON_INTERPRET=1` in the environment the Triton kernels run on the CPU, thousands of times slower: for tests.
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from esper.kasmina import telemetry
from esper.kasmina.blend import Addition, blend_by_torch

_PLAIN: Final = (Tensor, nn.Parameter)
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def chunk_moments(rows_LNF: Tensor, chunks: int) -> Tensor:
    """Return `esper.kasmina.telemetry.chunk_moments`."""
    if not runs_triton(rows_LNF) or rows_LNF.shape[1] > telemetry.MAX_ROWS:
        return telemetry.chunk_moments(rows_LNF, chunks)
    from esper.kasmina.kernels_triton import chunk_moments as by_triton

    return by_triton(rows_LNF, chunks)


def blend(y: Tensor, additions: Sequence[Addition], dim: int) -> Tensor:
    """Return `esper.kasmina.blend.blend_by_torch`; Triton adds in float32 and rounds once in four."""
    residuals, alphas = [a.residual for a in additions], [a.alpha for a in additions if a.alpha is not None]
    if not runs_triton(y, *residuals, *alphas) or any(alpha.requires_grad for alpha in alphas):
        return blend_by_torch(y, additions, dim)
    from esper.kasmina.kernels_triton import blend as by_triton

    return by_triton(y, additions, dim)


def runs_triton(*tensors: Tensor) -> bool:
    """Whether Triton kernels can work on these tensors here and now.

    Not for subclasses of tensors (shards), float64, nor while torch exports, compiles or transforms a function.

    Example:
        >>> runs_triton(torch.ones(2, dtype=torch.float64))
        False
    """
    return (
        _has_engine(tensors[0].device.type)
        and all(type(t) in _PLAIN and t.dtype in _DTYPES and t.device == tensors[0].device for t in tensors)
        and not (torch.compiler.is_exporting() or torch.compiler.is_compiling())
        and torch._C._functorch.peek_interpreter_stack() is None
    )


@cache
def _has_engine(device_type: str) -> bool:
    """Whether Triton runs on a kind of device; asked once per process."""
    if device_type == "cuda":
        return has_triton()
    return device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
