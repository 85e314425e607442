"""What a compiled kernel costs, from request to use: `python benchmarks/kernels.py [--write FILE] [NAME ... | all]`.

A forge of its own compiles, tries out and measures the reference kernel of each of the ten standard blueprints, or of
all that compile, one at a time, on one worker of each kind. Columns: wall-clock and processor time and peak memory of
the compilation; size of both files; forward time of 8 samples; the time of a forward and backward pass as a share of
the eager one, as Urabrask measured it; largest relative difference of results and gradients from float64; seconds from
the request to the verdict; the verdict. A kernel that is too slow has passed every check of its results and gradients
before (batch 1, odd batches, training and evaluation, bfloat16 inputs, strides, autocast, see docs/forge.md).

Below, what a run pays off its training thread for a kernel that was validated: every check of signature, role, serial,
hash and fingerprint; loading both files for the first time in a process, and again; and the whole of it, to a kernel
that was warmed up and compared with its eager child.
`--root` keeps the forge's folder, and what is there already is not compiled again.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from esper.blueprints import STANDARD, SiteShape, load_library, parse_ir
from esper.forge.client import Forge
from esper.forge.link import REQUESTED, ForgeLink
from esper.karn.service import plain, reference, stated
from esper.kasmina.compiled import CompiledPair
from esper.kasmina.forge_store import ForgeStore
from esper.kasmina.kernels import KernelRequest
from esper.leyline.artifacts import CompilationRequest, KernelSpec
from esper.leyline.errors import BusError
from esper.leyline.events import KernelRejected
from esper.leyline.kernels import ArtifactStatus, CompiledKernelArtifact
from esper.oona.contracts import Bus
from esper.tezzeret.toolchain import fingerprint, kernel_id
from esper.urza.store import Urza

PATIENCE_S = 900.0
AGAIN, REPEATS = 200, 5
DOCUMENT = Path(__file__).parents[1] / "docs" / "blueprints.md"
ENDED = {ArtifactStatus.VALIDATED, ArtifactStatus.REJECTED}


_Found = TypeVar("_Found")


class Verdict(NamedTuple):
    """What became of one blueprint's kernel; no kernel where it could not be compiled."""

    name: str
    seconds: float
    kernel: CompiledKernelArtifact | None
    size: int = 0
    why: str = ""


class Load(NamedTuple):
    """One thing that a run pays for a kernel: milliseconds, one entry a time."""

    what: str
    times_ms: list[float]


def waited(ready: Callable[[], _Found | None], what: str, every_s: float = 0.1) -> _Found:
    """Wait for something that should come to pass within a quarter of an hour, and look for it again and again."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if (found := ready()) is not None:
            return found
        time.sleep(every_s)
    raise SystemExit(f"{what} did not come in {PATIENCE_S:.0f} s")


def connected(forge: Forge) -> Bus:
    """Start the forge, and return a connection to it."""

    def bus() -> Bus | None:
        try:
            return forge.connect()
        except BusError:
            return None

    return waited(bus, "the forge")


def tried_out(urza: Urza) -> bool | None:
    """Tell whether the eager kernels of the standard blueprints have their verdict, which a new forge begins with."""
    ended = {kernel.blueprint_id for kernel in urza.kernels() if kernel.status in ENDED}
    return len(ended) >= len(STANDARD) or None


def asked_for(name: str, dtype: str) -> KernelSpec:
    """Return the reference kernel of a blueprint."""
    return reference(stated(load_library()[name].ir).ir).model_copy(update={"dtype": dtype})


def compilable() -> list[str]:
    """Return the blueprints that the table in docs/blueprints.md says can be compiled."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| `BP-")]
    return [cells[1].strip("`") for cells in rows if cells[-2] == "yes"]


def submitted(urza: Urza, bus: Bus, name: str, dtype: str) -> Verdict:
    """Ask for the compiled kernel of a blueprint, and wait for the verdict."""
    spec = asked_for(name, dtype)
    wanted, news = kernel_id(spec, "standard"), bus.subscribe("compilation.failed")
    began = time.perf_counter()
    bus.publish(CompilationRequest(spec=spec, pipeline="standard", requester="benchmark"), REQUESTED)

    def verdict() -> Verdict | None:
        heard = news.receive(0.0)
        if heard is not None:
            news.ack(heard)
            if isinstance(heard.message, KernelRejected):
                return Verdict(name, time.perf_counter() - began, None, why=heard.message.detail)
        if not urza.has(wanted) or urza.kernel(wanted).status not in ENDED:
            return None
        size = sum(file.stat().st_size for file in urza.folder(wanted).glob("*.so"))
        return Verdict(name, time.perf_counter() - began, urza.kernel(wanted), size, urza.reason(wanted))

    found = waited(verdict, f"a verdict on {name}")
    news.close()
    return found


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds that a call takes."""
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def loads(forge: Forge, urza: Urza, kernels: list[str]) -> list[Load]:
    """Measure what a run pays for each of these kernels."""
    rounds = range(AGAIN // len(kernels))
    verify = [timed(partial(urza.verified, name, fingerprint())) for _ in rounds for name in kernels]
    found = [urza.verified(name, fingerprint()) for name in kernels]
    first, *again = [
        [timed(partial(CompiledPair, f.folder, f.manifest)) for f in found] for _ in range(1 + len(rounds))
    ]
    whole = [taken for name in kernels for taken in ingested(forge, urza, name)]
    return [
        Load("verify: signatures, role, serial, hashes, fingerprint", verify),
        Load("load both files, the first time in a process", first),
        Load("load both files, again", sum(again, [])),
        Load("a run's whole way: ask, verify, load, warm up, compare", whole),
    ]


def ingested(forge: Forge, urza: Urza, kernel_id: str) -> list[float]:
    """Return the milliseconds until a run's store offers a kernel, off the training thread, each time anew."""
    spec = urza.manifest(kernel_id).spec
    ir = parse_ir(plain(spec.ir))
    request = KernelRequest(ir.name, SiteShape(spec.layout, spec.d_in, spec.d_out, spec.tokens, spec.kind), ir.reads)
    found = []
    for _ in range(REPEATS):
        link = ForgeLink(forge.connect, forge.shelf, fingerprint)
        store = ForgeStore(link, adopt="any")
        store.eager.wait(request)
        link.validated(spec, None)  # Opens the store, which a run does once.
        began = time.perf_counter()
        store.prefetch(request)
        waited(partial(store.cache.get, request), f"{kernel_id} in a run's store", 1e-4)
        found.append(1e3 * (time.perf_counter() - began))
        store.close()
    return found


def compiled_table(verdicts: list[Verdict]) -> Table:
    """Lay out what became of the blueprints."""
    table = Table("blueprint", "compile s", "CPU-s", "peak MiB", "files KiB", box=MARKDOWN)
    for column in ("forward ms", "compiled / eager", "from float64", "request to verdict s", "verdict"):
        table.add_column(column)
    for v in verdicts:
        record = v.kernel.compilation_record if v.kernel else None
        report = v.kernel.validation_report if v.kernel else None
        numbers = [record.compilation_seconds, record.cpu_seconds, record.peak_memory_mb] if record else []
        shown = [f"{n:.1f}" for n in numbers[:2]] + [f"{n:.0f}" for n in numbers[2:]] or [""] * 3
        step = report.baseline_comparison.get("step") if report else None
        share = f"{step:.3f}" if step else ""
        measured = report.benchmark_results if report else None
        told = (f"{measured.latency_ms_mean:.3f}", share, f"{measured.precision_drift:.1e}") if measured else ("",) * 3
        verdict = f"{v.kernel.status.value}{': ' + v.why if v.why else ''}" if v.kernel else f"not compiled: {v.why}"
        table.add_row(v.name, *shown, f"{v.size / 1024:.0f}", *told, f"{v.seconds:.0f}", verdict)
    return table


def loads_table(measured: list[Load]) -> Table:
    """Lay out what a run pays."""
    table = Table("what a run pays, off its training thread", "times", "least ms", "median ms", "p99 ms", box=MARKDOWN)
    for load in measured:
        times = sorted(load.times_ms)
        shown = (times[0], statistics.median(times), times[int(0.99 * (len(times) - 1))])
        table.add_row(load.what, str(len(times)), *(f"{value:.2f}" for value in shown))
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="blueprints, or all; the standard ten by default")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--root", type=Path, help="folder of the forge; a temporary one by default")
    parser.add_argument("--write", type=Path, help="Markdown file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = compilable() if given.names == ["all"] else given.names or STANDARD
    console = Console(width=190, record=True)
    with tempfile.TemporaryDirectory() as folder, Forge(enabled=True, root=str(given.root or folder)) as forge:
        bus, opened = connected(forge), time.perf_counter()
        urza = waited(forge.shelf, "the store")
        with bus, urza:
            waited(lambda: tried_out(urza), "the library's eager kernels")
            console.print(f"Eager kernels of {len(STANDARD)} blueprints: {time.perf_counter() - opened:.0f} s.\n")
            verdicts = [submitted(urza, bus, name, given.dtype) for name in names]
            console.print(compiled_table(verdicts))
            good = [v.kernel.id for v in verdicts if v.kernel and v.kernel.status is ArtifactStatus.VALIDATED]
            if good:
                console.print()
                console.print(loads_table(loads(forge, urza, good)))
    if given.write:
        where = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
        asked = " ".join(["python benchmarks/kernels.py", f"--dtype {given.dtype}", *given.names])
        head = f"# What a compiled kernel costs\n\nCommand: `{asked}`. {where}, two cores.\n"
        text = (__doc__ or "").partition("\n\n")[2]
        given.write.write_text(f"{head}\n{text}\n{console.export_text()}", encoding="utf-8")


if __name__ == "__main__":
    main()
