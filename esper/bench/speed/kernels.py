"""What a run pays for a kernel: a lookup of one in memory, loading one that is verified, and the whole way.

The kernel is a real one, in a real store in a scratch folder, with the signatures of Tezzeret and Urabrask. It is
eager; `esper.bench.speed.compiling` does the same with one that is compiled.
"""

import hashlib
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, time
from typing import Final

import torch

from esper.bench.speed.line import Line
from esper.bench.speed.timing import least, timed
from esper.blueprints import SiteShape, build, load_library, parse_ir
from esper.blueprints.build import Child
from esper.karn.service import plain, reference, stated
from esper.kasmina.compiled import CompiledPair
from esper.kasmina.kernels import KernelRequest
from esper.kasmina.library_store import LibraryKernelStore
from esper.leyline.artifacts import CompiledKernel, KernelSpec
from esper.leyline.codec import to_json
from esper.leyline.kernels import UrabraskValidationReport
from esper.leyline.reports import HardwareContext
from esper.tezzeret.compile import compile_kernel
from esper.tezzeret.toolchain import fingerprint
from esper.urza.door import VerifiedKernel
from esper.urza.signing import KeyRing
from esper.urza.store import Urza

KIND: Final = "BP-MLP-GELU"

HIT_US: Final = 10.0
LOAD_MS: Final = 1.0
LOAD_COMPILED_MS: Final = 2.0
WHOLE_P99_MS: Final = 10.0


def spec(kind: str = KIND) -> KernelSpec:
    """Return the reference kernel of a blueprint: 64 features, 128 positions."""
    return reference(stated(load_library()[kind].ir).ir)


def hit_line(lookups: int) -> Line:
    """Return the time of a lookup that finds its kernel, in microseconds."""
    store = LibraryKernelStore()
    request = KernelRequest(KIND, SiteShape("btd", 64, 64, 128, "stream"), "declared", (("h", 16),))
    try:
        kernel = store.poll(request)
        bare = {request: kernel}
        found = least(lambda: store.poll(request), lookups)
        return Line(
            what="cached hit",
            value=1e6 * found,
            unit="µs",
            target=HIT_US,
            limit=1e6 * least(lambda: bare.get(request), lookups),
            of="a dict lookup",
            numbers={"lookups": lookups},
        )
    finally:
        store.close()


def stored(folder: Path) -> tuple[Urza, str]:
    """Return a store that holds one eager kernel, signed and with a verdict, and the id of that.

    The verdict is the bench's own, because only its signature matters here: the store is gone after the bench.
    """
    made = folder / "made"
    made.mkdir(parents=True)
    compiled = compile_kernel(spec(), "fast", made)
    manifest = compiled.manifest
    urza = Urza(folder / "store", KeyRing(folder / "keys"))
    urza.put(
        CompiledKernel(
            manifest=(made / "manifest.json").read_text(encoding="utf-8"),
            files={name: (made / name).read_bytes() for name in manifest.files},
            record=to_json(compiled.record),
        )
    )
    urza.judge(
        UrabraskValidationReport(
            kernel_artifact_id=manifest.kernel_id,
            passed_validation=True,
            risk_score=0.0,
            conf_level=0.0,
            hardware_context=HardwareContext(device_type="cpu"),
            report_timestamp=time(),
        )
    )
    return urza, manifest.kernel_id


def eager(found: VerifiedKernel) -> Child:
    """Return a child of a verified eager kernel, from its file."""
    one = found.manifest.spec
    ir = parse_ir(plain((found.folder / "ir.json").read_text(encoding="utf-8")))
    return build(ir, SiteShape(one.layout, one.d_in, one.d_out, one.tokens, one.kind), one.dims, seed=0)


def eager_lines(times: int) -> list[Line]:
    """Return what a stored eager kernel costs."""
    with TemporaryDirectory(prefix="esper-speed-") as name:
        urza, kernel_id = stored(Path(name))
        with urza:
            found = urza.verified(kernel_id, fingerprint())
            weights = sum(p.numel() * p.element_size() for p in eager(found).parameters())
            return load_lines(urza, kernel_id, eager, times, "eager", weights, LOAD_MS)


def compiled_lines(urza: Urza, kernel_id: str, times: int) -> list[Line]:
    """Return what a stored compiled kernel costs."""

    def load(found: VerifiedKernel) -> CompiledPair:
        return CompiledPair(found.folder, found.manifest)

    found = urza.verified(kernel_id, fingerprint())
    size = sum((found.folder / file).stat().st_size for file in found.manifest.files)
    return load_lines(urza, kernel_id, load, times, "compiled", size, LOAD_COMPILED_MS)


def load_lines(
    urza: Urza,
    kernel_id: str,
    load: Callable[[VerifiedKernel], object],
    times: int,
    kind: str,
    size: int,
    target: float,
) -> list[Line]:
    """Return what a stored kernel costs: loading it once it is verified, and both, off the training thread.

    Args:
        urza: the store.
        kernel_id: the kernel.
        load: loads it.
        times: how often.
        kind: of the kernel, for people.
        size: bytes of which the limit is a copy.
        target: most milliseconds of loading.
    """
    mark = fingerprint()
    found = urza.verified(kernel_id, mark)
    loads = timed(lambda: load(found), times)
    verifications = timed(lambda: urza.verified(kernel_id, mark), times)
    with ThreadPoolExecutor(1) as background:
        way = [background.submit(_way, urza, kernel_id, mark, load).result() for _ in range(times)]
    files = [file.read_bytes() for file in sorted(found.folder.iterdir())]
    hashing = timed(lambda: [hashlib.sha256(data).digest() for data in files], times)
    source, target_bytes = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    copying = timed(lambda: target_bytes.copy_(source), times)
    return [
        Line(
            what=f"load of a verified {kind} kernel",
            value=_median(loads),
            unit="ms",
            target=target,
            limit=_median(copying),
            of=f"memcpy of its {size / 1024:.0f} KiB",
            numbers={"times": times, "p99_ms": p99(loads), "bytes": size},
        ),
        Line(
            what=f"verify and load, {kind}, off the thread: p99",
            value=p99(way),
            unit="ms",
            target=WHOLE_P99_MS,
            limit=p99(hashing),
            of=f"SHA-256 of its {sum(map(len, files)) / 1024:.0f} KiB: p99",
            numbers={"times": times, "median_ms": _median(way), "verify_median_ms": _median(verifications)},
        ),
    ]


def _way(urza: Urza, kernel_id: str, mark: str, load: Callable[[VerifiedKernel], object]) -> float:
    began = perf_counter()
    load(urza.verified(kernel_id, mark))
    return perf_counter() - began


def _median(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)


def p99(seconds: Sequence[float]) -> float:
    """Return the 99th percentile in milliseconds; of few values, the largest.

    Example:
        >>> p99([0.001 * n for n in range(1, 201)])
        198.0
    """
    ordered = sorted(seconds)
    return round(1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)) - (len(ordered) >= 100))], 6)
