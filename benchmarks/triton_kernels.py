"""The Triton kernels on a GPU: `python benchmarks/triton_kernels.py`.

First their results are checked against plain torch. Then they are timed beside it: bytes per second that must be moved
(every input read once, every output written once), as a share of what a plain copy reaches in the same run, and how
many times as long plain torch takes. The median of 50 runs after 10, by the device's own clock.
Without a CUDA device nothing is timed: the kernels are checked on Triton's interpreter, and the status is 0 if they are
right.
"""

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from esper.kasmina import fused, telemetry
from esper.kasmina.blend import Addition, blend_by_torch
from esper.kasmina.checks import check_triton

FOLDER = Path(__file__).parents[1] / ".venv" / "triton"
"""Where `make setup` puts Triton for a CPU build of torch."""
WARM_UP, RUNS = 10, 50
COPY_BYTES = 2**28


class Case(NamedTuple):
    """One thing to time: by Triton, by plain torch, and the bytes that it must move."""

    name: str
    fused: Callable[[], object]
    plain: Callable[[], object]
    nbytes: int


def median_s(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes on the device."""
    found = []
    for run in range(WARM_UP + RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if run >= WARM_UP:
            found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


def copy_bandwidth() -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_s(lambda: target.copy_(source))


def cases() -> Iterator[Case]:
    """Yield moments at the sizes of one batch of readings and of many, and blends with their backward passes."""
    for readings, samples, features, chunks in (
        (8, 128, 64, 1),
        (8, 32, 4096, 1),
        (2048, 128, 256, 1),
        (512, 32, 4096, 8),
    ):
        rows = torch.randn(readings, samples, features, device="cuda")
        name = f"moments of {readings} x [{samples}, {features}], {chunks} chunk{'s' * (chunks > 1)}"
        yield Case(
            name,
            lambda rows=rows, chunks=chunks: fused.chunk_moments(rows, chunks),
            lambda rows=rows, chunks=chunks: telemetry.chunk_moments(rows, chunks),
            rows.nbytes,
        )
    for dtype in (torch.float32, torch.bfloat16):
        for count in (1, 4):
            yield from blends((8, 2048, 4096), -1, dtype, count, None)
        yield from blends((8, 2048, 4096), -1, dtype, 1, 1024)
        yield from blends((64, 256, 56, 56), 1, dtype, 1, None)


def blends(shape: tuple[int, ...], dim: int, dtype: torch.dtype, count: int, width: int | None) -> Iterator[Case]:
    """Yield the blend of some residuals, and its backward pass."""
    y = torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()
    whole = list(shape)
    whole[dim] = width or shape[dim]
    residuals = [torch.randn(whole, device="cuda", dtype=dtype).requires_grad_() for _ in range(count)]
    additions = [Addition(r, torch.tensor(0.5, device="cuda"), 0, width) for r in residuals]
    name = f"{count} to {str(dtype).removeprefix('torch.')}{list(shape)}" + (f", {width} wide" if width else "")
    part = residuals[0].nbytes
    without = torch.no_grad()
    yield Case(
        f"blend of {name}",
        without(lambda: fused.blend(y, additions, dim)),
        without(lambda: blend_by_torch(y, additions, dim)),
        2 * y.nbytes + count * part,
    )
    grad = torch.randn_like(y)
    graphs = [blend(y, additions, dim) for blend in (fused.blend, blend_by_torch)]
    first, second = (_backward(out, residuals, grad) for out in graphs)
    yield Case(f"gradients, {name}", first, second, (1 + count) * part)


def _backward(out: Tensor, residuals: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(out, residuals, grad, retain_graph=True)


def measure() -> None:
    """Time every case and print the table."""
    bandwidth = copy_bandwidth()
    table = Table("what", "us", "GB/s", "of a copy", "plain torch", box=SIMPLE_HEAD)
    for case in cases():
        took, plain = median_s(case.fused), median_s(case.plain)
        speed = case.nbytes / took
        row = (f"{1e6 * took:.0f}", f"{speed / 1e9:.0f}", f"{speed / bandwidth:.0%}", f"{plain / took:.2f} x")
        table.add_row(case.name, *row)
    console = Console(width=120)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e9:.0f} GB/s")
    console.print(table)


def interpret() -> int:
    """Check the kernels without a GPU."""
    # Read when the kernels are defined, which is when the first of them runs.
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(str(FOLDER))
    if not fused.runs_triton(torch.ones(1)):
        sys.stderr.write("There is no CUDA device, and no Triton to check the kernels with; run `make setup`.\n")
        return 1
    torch.set_num_threads(1)
    check_triton("cpu")
    sys.stdout.write("There is no CUDA device: nothing was timed. On Triton's interpreter the kernels are right.\n")
    return 0


def main() -> int:
    """Check, and measure where there is a GPU."""
    if not torch.cuda.is_available():
        return interpret()
    check_triton("cuda")
    measure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
