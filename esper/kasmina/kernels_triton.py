"""Triton kernels: the moments of many readings in one pass over them, and the blend of a site's output.

`esper.kasmina.fused` decides when they run. Results do not depend on the order in which programs run: nothing is added
up by atomics.

Shapes: as in `esper.kasmina.telemetry`; a blend sees its tensors as [O, D, I], with the features D in the middle.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from esper.kasmina import telemetry
from esper.kasmina.blend import Addition

_TILE: Final = 4096
"""Values of a reading that one program holds."""
_BLOCK: Final = 1024
"""Values of an activation that one program blends."""
_AT_ONCE: Final = 4
"""Residuals that are blended in one pass."""


@triton.jit(do_not_specialize=["samples", "features", "chunks", "size"])  # type: ignore[untyped-decorator, unused-ignore]
def _moments_kernel(  # type: ignore[no-untyped-def]
    rows,
    sums,
    totals,
    samples,
    features,
    chunks,
    size,
    dead,
    band,
    SAMPLES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Write, for one block of features of one chunk of one reading, four sums over it and every sample's `sum z`."""
    reading, chunk, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    end = tl.where(chunk == chunks - 1, features, (chunk + 1) * size)
    n = tl.arange(0, SAMPLES)
    f = chunk * size + block * FEATURES + tl.arange(0, FEATURES)
    seen, held = (n < samples)[:, None] & (f < end)[None, :], f < end
    x = tl.load(rows + (reading * samples + n[:, None]) * features + f[None, :], mask=seen, other=0.0)
    mean = tl.sum(x, axis=0) / samples
    centred = tl.where(seen, x - mean[None, :], 0.0)
    variance = tl.sum(centred * centred, axis=0) / samples
    alive = held & (variance >= dead)
    scale = tl.where(alive, 1.0 / tl.sqrt(tl.where(alive, variance, 1.0)), 0.0)
    # The zeros that fill up the tile lie within: what is centred has values on both sides.
    low, high = tl.min(centred, axis=0), tl.max(centred, axis=0)
    middle, reach = (low + high) / 2, (high - low) * (0.5 - band)
    at_end = tl.where(seen & (tl.abs(centred - middle[None, :]) >= reach[None, :]), 1.0, 0.0)
    saturated = tl.maximum(tl.sum(at_end, axis=0) - 2.0, 0.0) / tl.maximum(samples - 2, 1)
    place = (reading * tl.num_programs(1) + chunk) * tl.num_programs(2) + block
    tl.store(sums + place * 4, tl.sum(tl.where(held, mean, 0.0)))
    tl.store(sums + place * 4 + 1, tl.sum(tl.where(held, variance, 0.0)))
    tl.store(sums + place * 4 + 2, tl.sum(tl.where(alive, 1.0, 0.0)))
    tl.store(sums + place * 4 + 3, tl.sum(tl.where(held, saturated, 0.0)))
    tl.store(totals + place * samples + n, tl.sum(centred * scale[None, :], axis=1), mask=n < samples)


def chunk_moments(rows_LNF: Tensor, chunks: int) -> Tensor:
    """Return `esper.kasmina.telemetry.chunk_moments`, with one read of the rows."""
    rows = rows_LNF.contiguous()
    readings, samples, features = rows.shape
    size = features // chunks
    lanes = triton.next_power_of_2(samples)
    width = min(_TILE // lanes, triton.next_power_of_2(features - size * (chunks - 1)))
    blocks = triton.cdiv(features - size * (chunks - 1), width)
    sums = rows.new_empty(readings, chunks, blocks, 4)
    totals = rows.new_empty(readings, chunks, blocks, samples)
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        _moments_kernel[(readings, chunks, blocks)](
            rows,
            sums,
            totals,
            samples,
            features,
            chunks,
            size,
            telemetry.DEAD_VARIANCE,
            telemetry.SATURATION_BAND,
            SAMPLES=lanes,
            FEATURES=width,
        )
    return telemetry.moments_of(sums.sum(2).mT, totals.sum(2).mT)


_COUNTS: Final = ["n", "span", "stride", "start", "count"]


@triton.jit(do_not_specialize=_COUNTS)  # type: ignore[untyped-decorator, unused-ignore]
def _blend_kernel(  # type: ignore[no-untyped-def]
    y, out, r0, r1, r2, r3, a0, a1, a2, a3, n, span, stride, start, count, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write `y + sum_i a_i r_i` over one chunk, for the first `count` of four residuals."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held, place = at < n, at
    if not WHOLE:
        place = at // span * stride + start + at % span
    value = tl.load(y + place, mask=held, other=0.0).to(tl.float32)
    value += tl.load(a0).to(tl.float32) * tl.load(r0 + at, mask=held, other=0.0).to(tl.float32)
    # Chosen, not added as zeros: a sum of negative zeros must stay one.
    more = value + tl.load(a1).to(tl.float32) * tl.load(r1 + at, mask=held & (count > 1), other=0.0).to(tl.float32)
    value = tl.where(count > 1, more, value)
    more = value + tl.load(a2).to(tl.float32) * tl.load(r2 + at, mask=held & (count > 2), other=0.0).to(tl.float32)
    value = tl.where(count > 2, more, value)
    more = value + tl.load(a3).to(tl.float32) * tl.load(r3 + at, mask=held & (count > 3), other=0.0).to(tl.float32)
    value = tl.where(count > 3, more, value)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=_COUNTS)  # type: ignore[untyped-decorator, unused-ignore]
def _scale_kernel(  # type: ignore[no-untyped-def]
    g, d0, d1, d2, d3, a0, a1, a2, a3, n, span, stride, start, count, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write `a_i g` over one chunk, for the first `count` of four residuals."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held, place = at < n, at
    if not WHOLE:
        place = at // span * stride + start + at % span
    value = tl.load(g + place, mask=held, other=0.0).to(tl.float32)
    tl.store(d0 + at, (tl.load(a0).to(tl.float32) * value).to(d0.dtype.element_ty), mask=held)
    tl.store(d1 + at, (tl.load(a1).to(tl.float32) * value).to(d1.dtype.element_ty), mask=held & (count > 1))
    tl.store(d2 + at, (tl.load(a2).to(tl.float32) * value).to(d2.dtype.element_ty), mask=held & (count > 2))
    tl.store(d3 + at, (tl.load(a3).to(tl.float32) * value).to(d3.dtype.element_ty), mask=held & (count > 3))


class _Chunk(NamedTuple):
    """A chunk that something is added to: its first feature, its width, and how many residuals it gets."""

    start: int
    width: int
    adds: int


def blend(y: Tensor, additions: Sequence[Addition], dim: int) -> Tensor:
    """Return `esper.kasmina.blend.blend_by_torch`; alphas get no gradient."""
    features = y.shape[dim]
    spans = [(a.start, features if a.width is None else a.width) for a in additions]
    chunks = [_Chunk(*span, len(list(same))) for span, same in groupby(spans)]
    alphas = [y.new_ones((), dtype=torch.float32) if a.alpha is None else a.alpha for a in additions]
    result: Tensor = _Blend.apply(y, dim, chunks, *alphas, *(a.residual for a in additions))  # type: ignore[no-untyped-call]
    return result


class _Blend(torch.autograd.Function):
    """`y + sum_i alpha_i r_i`, with the gradients `g` and `alpha_i g`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dim: int, chunks: list[_Chunk], *tensors: Tensor) -> Tensor:
        """Blend the residuals of one chunk after the other, four at once."""
        alphas, residuals = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        ctx.dim, ctx.chunks = dim, chunks
        ctx.save_for_backward(*alphas)
        axes = _Axes.of(y, dim)
        source = axes.flat(y)
        if chunks[0].width == source.shape[1]:
            out = torch.empty_like(source)
        else:
            source = out = source.clone()
        for chunk, first, last in _passes(chunks):
            flat = [axes.flat(r) for r in residuals[first:last]]
            _launch(_blend_kernel, [source, out, *_four(flat), *_four(alphas[first:last])], out, chunk)
            source = out
        return axes.back(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Scale the gradient for every residual; it reaches y as it is."""
        alphas, dim, chunks = ctx.saved_tensors, ctx.dim, ctx.chunks
        # Someone differentiates the gradient again: that must be made of operations with a gradient of their own.
        scale = _scaled_by_torch if torch.is_grad_enabled() else _scaled
        return (grad, None, None, *(None for _ in alphas), *scale(grad, alphas, dim, chunks))


def _scaled_by_torch(grad: Tensor, alphas: Sequence[Tensor], dim: int, chunks: list[_Chunk]) -> list[Tensor]:
    places = [chunk for chunk in chunks for _ in range(chunk.adds)]
    parts = [grad.narrow(dim, chunk.start, chunk.width) for chunk in places]
    return [part * alpha.to(part.dtype) for part, alpha in zip(parts, alphas, strict=True)]


def _scaled(grad: Tensor, alphas: Sequence[Tensor], dim: int, chunks: list[_Chunk]) -> list[Tensor]:
    axes, found = _Axes.of(grad, dim), []
    flat = axes.flat(grad)
    for chunk, first, last in _passes(chunks):
        made = [flat.new_empty(flat.shape[0], chunk.width, flat.shape[2]) for _ in range(first, last)]
        _launch(_scale_kernel, [flat, *_four(made), *_four(alphas[first:last])], flat, chunk._replace(adds=len(made)))
        found += [axes.back(part) for part in made]
    return found


class _Axes(NamedTuple):
    """How a tensor is seen as [O, D, I] without a copy, where it can be.

    Args:
        shape: the tensor's shape.
        dim: its feature dimension.
        last: whether the features of an image come last in memory.
    """

    shape: torch.Size
    dim: int
    last: bool

    @classmethod
    def of(cls, t: Tensor, dim: int) -> "_Axes":
        last = t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
        return cls(t.shape, dim % t.dim(), last)

    def flat(self, t: Tensor) -> Tensor:
        moved = (t.permute(0, 2, 3, 1) if self.last else t).contiguous()
        dim = len(self.shape) - 1 if self.last else self.dim
        return moved.view(moved.shape[:dim].numel(), moved.shape[dim], moved.shape[dim + 1 :].numel())

    def back(self, flat: Tensor) -> Tensor:
        shape = list(self.shape)
        shape[self.dim] = flat.shape[1]
        if not self.last:
            return flat.view(shape)
        batch, features, height, width = shape
        return flat.view(batch, height, width, features).permute(0, 3, 1, 2)


def _passes(chunks: list[_Chunk]) -> list[tuple[_Chunk, int, int]]:
    """Return chunk, first and last addition of every launch."""
    found, first = [], 0
    for chunk in chunks:
        end = first + chunk.adds
        for begin in range(first, end, _AT_ONCE):
            last = min(begin + _AT_ONCE, end)
            found.append((chunk._replace(adds=last - begin), begin, last))
        first = end
    return found


def _four(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fill up to four; what stands for none is never read, nor written."""
    return [*tensors, *[tensors[0]] * (_AT_ONCE - len(tensors))]


def _launch(kernel: Any, tensors: list[Tensor], whole: Tensor, chunk: _Chunk) -> None:
    outer, features, inner = whole.shape
    n, sizes = outer * chunk.width * inner, (chunk.width * inner, features * inner, chunk.start * inner)
    if n == 0:
        return
    with torch.cuda.device_of(whole):  # type: ignore[no-untyped-call]
        kernel[(triton.cdiv(n, _BLOCK),)](*tensors, n, *sizes, chunk.adds, WHOLE=chunk.width == features, BLOCK=_BLOCK)
