"""Which kernels match a query: columns in memory, rebuilt from the records and kept up by the ledger."""

import json
from typing import Final, NamedTuple, final

import numpy as np
import numpy.typing as npt

from esper.leyline.artifacts import KernelManifest, KernelSpec
from esper.leyline.kernels import (
    ArtifactStatus,
    CompiledKernelArtifact,
    KernelQuery,
    KernelQueryResult,
    RankedKernel,
)
from esper.urza.canonical import canonical, sha256

RANKED: Final = 16
"""How many matches are ranked, best first."""

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

_GROWTH: Final = 256


class Numbers(NamedTuple):
    """What is known of one kernel in numbers; infinite where it was not measured.

    Args:
        latency_ms: mean forward time, in milliseconds.
        memory_mb: peak memory, in MiB.
        risk: 0 (safe) to 1.
        interest: greatest interest of any source, 0 to 1.
    """

    latency_ms: float
    memory_mb: float
    risk: float
    interest: float

    @classmethod
    def of(cls, kernel: CompiledKernelArtifact) -> "Numbers":
        """Read them from the kernel's report."""
        report = kernel.validation_report
        interest = max(kernel.interest_scores.values(), default=0.0)
        if report is None or report.benchmark_results is None:
            return cls(float("inf"), float("inf"), 1.0, interest)
        measured = report.benchmark_results
        return cls(measured.latency_ms_mean, measured.memory_mb_peak, report.risk_score, interest)


@final
class Catalogue:
    """The VALIDATED kernels, by column.

    Example:
        >>> Catalogue().find(KernelQuery(required_tags=("low_latency",))).matching_kernels
        ()
    """

    def __init__(self) -> None:
        """Start empty."""
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._columns: dict[str, int] = {}
        self._specs: dict[str, set[str]] = {}
        self._fingerprints: dict[str, str] = {}
        self._facts: Bools = np.zeros((_GROWTH, _GROWTH), bool)
        self._numbers: Floats = np.zeros((_GROWTH, len(Numbers._fields)))
        self._offered: Bools = np.zeros(_GROWTH, bool)

    def __len__(self) -> int:
        """Return how many kernels are offered."""
        return int(self._offered.sum())

    def update(self, kernel: CompiledKernelArtifact, manifest: KernelManifest) -> None:
        """Write a kernel's row; only VALIDATED ones are offered."""
        row = self._rows.get(kernel.id)
        if row is None:
            row = self._rows[kernel.id] = len(self._ids)
            self._ids.append(kernel.id)
        columns = [self._columns.setdefault(fact, len(self._columns)) for fact in facts(kernel, manifest)]
        self._grow()
        self._facts[row] = False
        self._facts[row, columns] = True
        self._numbers[row] = Numbers.of(kernel)
        self._offered[row] = kernel.status is ArtifactStatus.VALIDATED
        self._specs.setdefault(spec_key(manifest.spec), set()).add(kernel.id)
        self._fingerprints[kernel.id] = manifest.fingerprint

    def withdraw(self, kernel_id: str) -> None:
        """Offer a kernel no more; nothing happens where there is none of this id."""
        if kernel_id in self._rows:
            self._offered[self._rows[kernel_id]] = False

    def find(self, query: KernelQuery) -> KernelQueryResult:
        """Return the kernels that match, in the order in which they came, and the best of them with reasons.

        A kernel scores up to 1 for the preferred tags that it has, 0.5 for its speed relative to the fastest match,
        0.3 for a low risk and 0.2 for the interest in it.
        """
        rows = np.flatnonzero(self._matching(query))
        if not len(rows):
            return KernelQueryResult()
        preferred = self._preferred(query, rows)
        scores = _scores(self._numbers[rows], preferred / max(len(query.preferred_tags), 1))
        order = np.argsort(-scores, kind="stable")[:RANKED]
        wanted = len(query.preferred_tags)
        ranked = [
            RankedKernel(
                kernel_artifact_id=self._ids[rows[at]],
                score=round(float(scores[at]), 6),
                why=_why(Numbers(*self._numbers[rows[at]]), int(preferred[at]), wanted),
            )
            for at in order
        ]
        return KernelQueryResult(matching_kernels=tuple(self._ids[row] for row in rows), ranked=tuple(ranked))

    def of_spec(self, spec: KernelSpec, fingerprint: str = "") -> list[str]:
        """Return the offered kernels of exactly this spec, fastest first.

        Args:
            spec: the kernel.
            fingerprint: of the binary interface that they must be for; empty takes any. Kernels without binary files
                are for every one.
        """
        kernels = self._specs.get(spec_key(spec), ())
        rows = [self._rows[kernel] for kernel in kernels if self._is_for(kernel, fingerprint)]
        offered = [row for row in rows if self._offered[row]]
        return [self._ids[row] for row in sorted(offered, key=lambda row: (self._numbers[row, 0], self._ids[row]))]

    def _is_for(self, kernel_id: str, fingerprint: str) -> bool:
        return not fingerprint or self._fingerprints[kernel_id] in ("", fingerprint)

    def _matching(self, query: KernelQuery) -> Bools:
        count = len(self._ids)
        match = self._offered[:count].copy()
        for fact in needed(query):
            match &= self._has(fact)
        for tag in query.excluded_tags:
            match &= ~self._has(f"tag {tag}")
        if query.max_latency_ms is not None:
            match &= self._numbers[:count, 0] <= query.max_latency_ms
        if query.max_memory_mb is not None:
            match &= self._numbers[:count, 1] <= query.max_memory_mb
        return match

    def _preferred(self, query: KernelQuery, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.int_]:
        """Return how many preferred tags each row has."""
        counts = np.zeros(len(rows), int)
        for tag in query.preferred_tags:
            counts += self._has(f"tag {tag}")[rows]
        return counts

    def _has(self, fact: str) -> Bools:
        column = self._columns.get(fact)
        return np.zeros(len(self._ids), bool) if column is None else self._facts[: len(self._ids), column]

    def _grow(self) -> None:
        """Make room by half as much again, so that growing costs little per row."""
        rows, columns = self._facts.shape
        if len(self._ids) > rows or len(self._columns) > columns:
            more_rows = max(0, len(self._ids) - rows) and rows // 2 + _GROWTH
            more_columns = max(0, len(self._columns) - columns) and columns // 2 + _GROWTH
            self._facts = np.pad(self._facts, ((0, more_rows), (0, more_columns)))
            self._numbers = np.pad(self._numbers, ((0, more_rows), (0, 0)))
            self._offered = np.pad(self._offered, (0, more_rows))


def facts(kernel: CompiledKernelArtifact, manifest: KernelManifest) -> set[str]:
    """Return what is true of a kernel, one text per fact that a query may ask for."""
    spec = manifest.spec
    sizes = {"d_in": spec.d_in, "d_out": spec.d_out, "tokens": spec.tokens, "d": _width(spec), **spec.dims}
    tags = kernel.validation_report.generated_tags if kernel.validation_report else ()
    return {
        *(f"tag {tag}" for tag in tags),
        *(f"dim {name}={size}" for name, size in sizes.items()),
        f"target {spec.target}",
        f"layout {spec.layout}",
        f"blueprint {kernel.name}",
        f"blueprint {kernel.blueprint_id}",
    }


def needed(query: KernelQuery) -> list[str]:
    """Return the facts that a match must have.

    Example:
        >>> needed(KernelQuery(dims={"d": 64}))
        ['target cpu', 'dim d=64']
    """
    found = [f"target {query.target}", *(f"tag {tag}" for tag in query.required_tags)]
    found += [f"dim {name}={size}" for name, size in query.dims.items()]
    if query.layout is not None:
        found.append(f"layout {query.layout}")
    if query.blueprint_id:
        found.append(f"blueprint {query.blueprint_id}")
    return found


def spec_key(spec: KernelSpec) -> str:
    """Return the hash that names a spec."""
    return sha256(canonical(spec))


def _width(spec: KernelSpec) -> int:
    """Return the features that the child reads, which its blueprint calls `d`."""
    try:
        blueprint = json.loads(spec.ir)
    except (ValueError, RecursionError):
        return spec.d_out
    reads = blueprint.get("reads") if isinstance(blueprint, dict) else None
    return spec.d_in if reads == "input" else spec.d_out


def _scores(numbers: Floats, preferred: Floats) -> Floats:
    latency, _, risk, interest = numbers.T
    latency = np.maximum(latency, 1e-9)
    fastest = min(latency.min(), np.finfo(np.float64).max)
    speed = fastest / latency
    return np.asarray(preferred + 0.5 * speed + 0.3 * (1.0 - risk) + 0.2 * interest)


def _why(numbers: Numbers, preferred: int, wanted: int) -> str:
    speed = f"{numbers.latency_ms:.3g} ms" if np.isfinite(numbers.latency_ms) else "no latency"
    tags = f"{preferred} of {wanted} preferred tags, " if wanted else ""
    return f"{tags}{speed}, risk {numbers.risk:.2f}, interest {numbers.interest:.2f}"
