"""Time Urza: `python benchmarks/urza.py [--kernels 10000] [--check]`.

What is measured: `verified` of a kernel of 1.3 MB (every signature and every byte), `find` over a full catalogue, `put`
and `judge` of the same kernel, opening a store, the first `find` (which builds the catalogue), and the ledger's check.
Wall-clock times: what else the machine does only ever adds to them, so the least is the time of an idle one.
`--check` makes a missed budget exit with status 1. All is written to a temporary folder.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from esper import leyline as ll
from esper.urza import KeyRing, Urza
from esper.urza.ledger import Ledger, Note
from esper.urza.records import Head

ARTIFACT = {"fw.so": 650_000, "bw.so": 650_000}
"""Sizes of a stripped compiled pair, in bytes."""
TAGS = ("low_latency", "low_memory", "stable", "high_throughput", "efficient")
IR = json.dumps({"name": "BP-BENCH", "reads": "output"}, separators=(",", ":"))


class Timing(NamedTuple):
    """One thing measured, in milliseconds, and the median allowed, or None."""

    name: str
    least: float
    median: float
    p99: float
    calls: int
    budget: float | None = None


def timed(name: str, call: Callable[[int], object], calls: int, budget: float | None = None) -> Timing:
    """Time a call; it is given its number."""
    times = []
    for number in range(calls):
        start = time.perf_counter()
        call(number)
        times.append(1000 * (time.perf_counter() - start))
    times.sort()
    return Timing(name, times[0], statistics.median(times), times[int(0.99 * (calls - 1))], calls, budget)


def kernel(name: str, files: dict[str, bytes]) -> ll.CompiledKernel:
    """Return a kernel of these files."""
    spec = ll.KernelSpec(ir=IR, layout="btd", d_in=64, d_out=64, tokens=32, kind="attention")
    manifest = ll.KernelManifest(
        kernel_id=name,
        name="BP-BENCH",
        blueprint_id=sha256(IR.encode()).hexdigest(),
        spec=spec,
        pipeline="standard",
        files={file: sha256(data).hexdigest() for file, data in files.items()},
    )
    record = ll.CompilationRecord(pipeline="standard", cpu_seconds=15.0)
    return ll.CompiledKernel(manifest=ll.to_json(manifest), files=files, record=ll.to_json(record))


def report(name: str, number: int) -> ll.UrabraskValidationReport:
    """Return a verdict with varying numbers and tags."""
    results = ll.BenchmarkResults(
        latency_ms_mean=0.1 + number % 97 / 50,
        latency_ms_p99=1.0,
        throughput_ops_per_sec=1000.0,
        memory_mb_peak=float(1 + number % 31),
        precision_drift=1e-6,
    )
    return ll.UrabraskValidationReport(
        kernel_artifact_id=name,
        benchmark_results=results,
        generated_tags=tuple(tag for bit, tag in enumerate(TAGS) if number >> bit & 1),
        passed_validation=True,
        risk_score=number % 10 / 10,
        conf_level=0.9,
        hardware_context=ll.HardwareContext(device_type="cpu"),
        report_timestamp=1.0,
    )


def fill(urza: Urza, count: int) -> None:
    """Write the records of many kernels in one change; their files are not needed for queries."""
    with urza.core.change() as change:
        for number in range(count):
            name = f"bulk-{number:06d}"
            made = ll.from_json(ll.KernelManifest, kernel(name, {}).manifest)
            record = ll.CompiledKernelArtifact(
                id=name,
                name=made.name,
                status=ll.ArtifactStatus.VALIDATED,
                blueprint_id=made.blueprint_id,
                compilation_pipeline="standard",
                validation_report=report(name, number),
            )
            urza.core.records.kernels.set(name, record)
            urza.core.records.manifests.set(name, made)
        change.note("", "benchmark", "bulk", detail=f"{count} kernels")


def measure(folder: Path, kernels: int) -> Iterator[Timing]:
    """Measure everything, one after the other."""
    keys = KeyRing(folder / "keys")
    urza = Urza(folder / "store", keys)
    files = {name: os.urandom(size) for name, size in ARTIFACT.items()}
    yield timed("put, 1.3 MB", lambda number: urza.put(kernel(f"k{number}", files)), 30)
    yield timed("judge, 1.3 MB", lambda number: urza.judge(report(f"k{number}", number)), 30)
    yield timed("SHA-256 alone of 1.3 MB", lambda _: [sha256(data).digest() for data in files.values()], 300)
    yield timed("verified, 1.3 MB", lambda number: urza.verified(f"k{number % 30}"), 300, 5.0)
    small = Urza(folder / "small", keys)
    small.put(kernel("s", {}))
    small.judge(report("s", 0))
    yield timed("verified, no compiled files", lambda _: small.verified("s"), 300)
    small.close()
    fill(urza, kernels)
    yield timed(f"first find, {kernels:,} kernels", lambda _: urza.find(ll.KernelQuery()), 1)
    query = ll.KernelQuery(required_tags=TAGS[:2], preferred_tags=TAGS[2:4], excluded_tags=TAGS[4:], max_latency_ms=1.0)
    yield timed(f"find by tags, {kernels:,} kernels", lambda _: urza.find(query), 300)
    yield timed(f"find everything, {kernels:,} kernels", lambda _: urza.find(ll.KernelQuery()), 30)
    urza.close()
    yield timed("open a store", lambda _: Urza(folder / "store", keys).close(), 10)
    ledger, entries = Ledger(folder / "ledger.jsonl"), [Note("tezzeret", "status", f"k{n}") for n in range(kernels)]
    head = ledger.append(Head(), entries)
    yield timed(f"verify a ledger of {kernels:,} entries", lambda _: ledger.verify(head), 5)


def table_of(results: list[Timing]) -> Table:
    """Lay the timings out."""
    table = Table(title="Urza: milliseconds", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("what", no_wrap=True)
    for column in ("least", "median", "p99", "calls", "budget"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results:
        budget = "" if row.budget is None else f"{row.budget:g}"
        table.add_row(row.name, f"{row.least:,.2f}", f"{row.median:,.2f}", f"{row.p99:,.2f}", str(row.calls), budget)
    return table


def main() -> int:
    """Print the table; return 1 if a budget was missed and `--check` was given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", type=int, default=10_000, help="kernels in the catalogue (default 10000)")
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a budget is missed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = list(measure(Path(folder), options.kernels))
    Console(width=100).print(table_of(results))
    print(f"Python {platform.python_version()}, {platform.machine()}, load {os.getloadavg()[0]:.1f}")
    return int(options.check and any(row.budget is not None and row.median > row.budget for row in results))


if __name__ == "__main__":
    sys.exit(main())
