"""What the compilation of a kernel costs, in a forge of its own, and what the compiled kernel costs a run."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Final

from esper.bench.speed.forge import compiled, connected
from esper.bench.speed.kernels import LOAD_COMPILED_MS, WHOLE_P99_MS, compiled_lines
from esper.bench.speed.line import Line, not_measured
from esper.forge.client import Forge
from esper.leyline.kernels import ArtifactStatus, CompiledKernelArtifact

CPU_S: Final = 20.0
WALL_S: Final = 120.0

KINDS: Final = ("BP-MLP-GELU", "BP-NORM-RMS")
"""The first makes what all compilations of a toolchain share, the headers; the second finds it."""

_ASK: Final = "give --compile"


def lines(folder: Path, times: int) -> list[Line]:
    """Compile two kernels, and return what that costs, and what loading one costs.

    Args:
        folder: scratch folder.
        times: loads of each kind.

    Raises:
        KernelError: a kernel cannot be compiled.
    """
    with Forge(enabled=True, root=str(folder / "forge")) as forge, connected(forge) as bus:
        bare = only_imports()
        found: list[Line] = []
        loads: list[Line] = []
        for number, kind in enumerate(KINDS):
            urza, kernel = compiled(forge, bus, kind)
            with urza:
                found += _cost(kind, kernel, "with headers" if number == 0 else "headers there", bare)
                if kernel.status is ArtifactStatus.VALIDATED:
                    loads = compiled_lines(urza, kernel.id, times)
        return [*found, *(loads or _no_loads("no compiled kernel was faster than its eager one here"))]


def left_out() -> list[Line]:
    """Return the same lines without values."""
    costs = [not_measured("compile one kernel, processor time", "s", CPU_S, _ASK)]
    return [*costs, not_measured("compile one kernel, on the clock", "s", WALL_S, _ASK), *_no_loads(_ASK)]


def _no_loads(why: str) -> list[Line]:
    return [
        not_measured("load of a verified compiled kernel", "ms", LOAD_COMPILED_MS, why),
        not_measured("verify and load, compiled, off the thread: p99", "ms", WHOLE_P99_MS, why),
    ]


def _cost(kind: str, kernel: CompiledKernelArtifact, how: str, bare: tuple[float, float]) -> Iterator[Line]:
    record = kernel.compilation_record
    assert record is not None
    report = kernel.validation_report
    numbers = {
        "peak_memory_mb": record.peak_memory_mb,
        "toolchain": record.toolchain_version,
        "status": kernel.status.value,
        "ratio_to_eager": dict(report.baseline_comparison) if report else {},
    }
    for what, value, target, limit in (
        ("processor time", record.cpu_seconds, CPU_S, bare[0]),
        ("on the clock", record.compilation_seconds, WALL_S, bare[1]),
    ):
        yield Line(
            what=f"compile {kind}, {how}, {what}",
            value=value,
            unit="s",
            target=target,
            limit=limit,
            of="a process that only imports the compiler",
            numbers=numbers,
        )


def only_imports() -> tuple[float, float]:
    """Return the processor and clock seconds of a process that imports torch's compiler and does nothing."""
    used, began = _children(), perf_counter()
    subprocess.run([sys.executable, "-c", "import torch._inductor.compile_fx"], check=True)
    return _children() - used, perf_counter() - began


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
