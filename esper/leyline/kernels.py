"""Blueprints, the kernels compiled from them, and the questions asked about them."""

from enum import StrEnum, unique

from pydantic import Field

from esper.leyline.base import Message, Record
from esper.leyline.reports import HardwareContext, Layout


@unique
class ArtifactStatus(StrEnum):
    """How far a blueprint or kernel has come; nothing is ever deleted."""

    UNVALIDATED = "UNVALIDATED"
    COMPILING = "COMPILING"
    INVALID = "INVALID"
    PENDING_BENCHMARKING = "PENDING_BENCHMARKING"
    VALIDATED = "VALIDATED"
    REJECTED = "REJECTED"
    ARCHIVED = "ARCHIVED"


class KernelQuery(Message):
    """What kind of kernel is wanted.

    Args:
        blueprint_id: name of the blueprint; empty for any.
        required_tags: tags that a match must have.
        preferred_tags: tags that raise a match's rank.
        excluded_tags: tags that a match must not have.
        max_latency_ms: bound on the mean forward time, in milliseconds; `None` for no bound.
        max_memory_mb: bound on the peak memory, in MiB; `None` for no bound.
        target: device type, e.g. `cpu` or `cuda`.
        layout: layout of the site; `None` for any.
        dims: sizes of the blueprint's dimensions, e.g. `{"d": 64}`.
    """

    blueprint_id: str = ""
    required_tags: tuple[str, ...] = ()
    preferred_tags: tuple[str, ...] = ()
    excluded_tags: tuple[str, ...] = ()
    max_latency_ms: float | None = Field(default=None, gt=0.0)
    max_memory_mb: float | None = Field(default=None, gt=0.0)
    target: str = "cpu"
    layout: Layout | None = None
    dims: dict[str, int] = Field(default_factory=dict)


class RankedKernel(Record):
    """A kernel that matches a query, its score (higher is better, no unit) and why it scored so."""

    kernel_artifact_id: str
    score: float
    why: str = ""


class KernelQueryResult(Message):
    """The kernels that match a query.

    Args:
        matching_kernels: ids of all matches, in the catalogue's order.
        ranked: the best of them, best first.
    """

    matching_kernels: tuple[str, ...] = ()
    ranked: tuple[RankedKernel, ...] = ()


class CompilationRecord(Message):
    """How a kernel was compiled.

    Args:
        pipeline: `fast`, `standard` or `aggressive`.
        compilation_seconds: wall-clock time, in seconds.
        cpu_seconds: processor time of the worker and its children, in seconds.
        peak_memory_mb: peak resident memory, in MiB.
        toolchain_version: compiler and library versions in one line.
        optimization_flags: flags given to the compiler.
    """

    pipeline: str
    compilation_seconds: float = Field(default=0.0, ge=0.0)
    cpu_seconds: float = Field(default=0.0, ge=0.0)
    peak_memory_mb: float = Field(default=0.0, ge=0.0)
    toolchain_version: str = ""
    optimization_flags: tuple[str, ...] = ()


class BenchmarkResults(Record):
    """What a kernel measured.

    Args:
        latency_ms_mean: mean forward time, in milliseconds.
        latency_ms_p99: 99th percentile of the forward time, in milliseconds.
        throughput_ops_per_sec: forwards per second.
        memory_mb_peak: peak memory, in MiB.
        power_watts_avg: mean power, in watts; `None` where it cannot be read.
        precision_drift: largest relative difference from a float64 reference.
    """

    latency_ms_mean: float = Field(ge=0.0)
    latency_ms_p99: float = Field(ge=0.0)
    throughput_ops_per_sec: float = Field(ge=0.0)
    memory_mb_peak: float = Field(ge=0.0)
    power_watts_avg: float | None = Field(default=None, ge=0.0)
    precision_drift: float = Field(ge=0.0)


class UrabraskValidationReport(Message):
    """The verdict on one kernel.

    Args:
        kernel_artifact_id: the kernel.
        benchmark_results: its measurements; `None` when it failed before the benchmark.
        generated_tags: tags that it earned.
        baseline_comparison: ratio to the eager module by name, e.g. `{"latency": 0.8}`; below 1 is better.
        passed_validation: whether it may be used.
        risk_score: 0 (safe) to 1.
        conf_level: confidence in the risk score, 0 to 1.
        hardware_context: device of the measurement.
        report_timestamp: seconds since the Unix epoch.
    """

    kernel_artifact_id: str
    benchmark_results: BenchmarkResults | None = None
    generated_tags: tuple[str, ...] = ()
    baseline_comparison: dict[str, float] = Field(default_factory=dict)
    passed_validation: bool
    risk_score: float = Field(ge=0.0, le=1.0)
    conf_level: float = Field(ge=0.0, le=1.0)
    hardware_context: HardwareContext
    report_timestamp: float = Field(ge=0.0)


class Blueprint(Message):
    """A blueprint as the catalogue knows it.

    Args:
        id: SHA-256 of its canonical IR, hexadecimal.
        name: e.g. `BP-MLP-SWIGLU`.
        version: semantic version, e.g. `1.0.0`.
        status: how far it has come.
        ir: the IR as canonical JSON text.
        parents: ids of the blueprints it was derived from.
        kernels: ids of the kernels compiled from it.
        interest_scores: score by source, 0 to 1; high ones are compiled first.
    """

    id: str
    name: str
    version: str = "1.0.0"
    status: ArtifactStatus = ArtifactStatus.UNVALIDATED
    ir: str = ""
    parents: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    interest_scores: dict[str, float] = Field(default_factory=dict)


class CompiledKernelArtifact(Message):
    """A compiled kernel as the catalogue knows it.

    Args:
        id: `<ir hash>-<target>-<pipeline>-<toolchain hash>`.
        name: name of its blueprint.
        version: version of its blueprint.
        status: how far it has come.
        blueprint_id: id of its blueprint.
        parents: ids of the kernels it replaces.
        compilation_pipeline: `fast`, `standard` or `aggressive`.
        kernel_ref: content hash of the directory that holds its files.
        compilation_record: how it was compiled; `None` until it is.
        validation_report: verdict; `None` until it is judged.
        interest_scores: score by source, 0 to 1.
    """

    id: str
    name: str
    version: str = "1.0.0"
    status: ArtifactStatus = ArtifactStatus.PENDING_BENCHMARKING
    blueprint_id: str
    parents: tuple[str, ...] = ()
    compilation_pipeline: str
    kernel_ref: str = ""
    compilation_record: CompilationRecord | None = None
    validation_report: UrabraskValidationReport | None = None
    interest_scores: dict[str, float] = Field(default_factory=dict)
