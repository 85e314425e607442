"""Kernels to put into stores: real records and files of arbitrary bytes, as no test here runs them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from esper.leyline.artifacts import CompiledKernel, KernelManifest, KernelSpec
from esper.leyline.codec import to_json
from esper.leyline.kernels import BenchmarkResults, Blueprint, CompilationRecord, UrabraskValidationReport
from esper.leyline.reports import HardwareContext
from esper.urza import KeyRing, Urza

FILES = {"fw.so": b"forward " * 500, "bw.so": b"backward" * 500}
CPU = HardwareContext(device_type="cpu")


def blueprint(name: str = "BP-A", version: str = "1.0.0", **fields: Any) -> Blueprint:
    ir = json.dumps({"name": name, "version": version}, sort_keys=True, separators=(",", ":"))
    return Blueprint(id=hashlib.sha256(ir.encode()).hexdigest(), name=name, version=version, ir=ir, **fields)


def spec(name: str = "BP-A", **fields: Any) -> KernelSpec:
    whole = {"layout": "btd", "d_in": 64, "d_out": 64, "tokens": 32, "kind": "attention", **fields}
    return KernelSpec(ir=blueprint(name).ir, **whole)


def compiled(
    kernel_id: str = "k1",
    name: str = "BP-A",
    files: dict[str, bytes] | None = None,
    cpu_seconds: float = 15.0,
    **fields: Any,
) -> CompiledKernel:
    files = FILES if files is None else files
    manifest = KernelManifest(
        kernel_id=kernel_id,
        name=name,
        blueprint_id=blueprint(name).id,
        spec=fields.pop("spec", spec(name)),
        pipeline="standard",
        files={file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
        **fields,
    )
    record = CompilationRecord(pipeline="standard", cpu_seconds=cpu_seconds)
    return CompiledKernel(manifest=to_json(manifest), files=files, record=to_json(record))


def verdict(kernel_id: str = "k1", passed: bool = True, **fields: Any) -> UrabraskValidationReport:
    measured = {"latency_ms": 0.5, "memory_mb": 10.0, **fields.pop("measured", {})}
    results = BenchmarkResults(
        latency_ms_mean=measured["latency_ms"],
        latency_ms_p99=2 * measured["latency_ms"],
        throughput_ops_per_sec=2000.0,
        memory_mb_peak=measured["memory_mb"],
        precision_drift=1e-6,
    )
    whole = {"risk_score": 0.1, "conf_level": 0.9, "report_timestamp": 1.0, "hardware_context": CPU, **fields}
    return UrabraskValidationReport(
        kernel_artifact_id=kernel_id, benchmark_results=results, passed_validation=passed, **whole
    )


def validated(urza: Urza, kernel_id: str = "k1", **fields: Any) -> None:
    urza.put(compiled(kernel_id, **fields))
    urza.judge(verdict(kernel_id))


def opened(root: Path, **fields: Any) -> Urza:
    return Urza(root / "store", KeyRing(root / "keys"), **fields)
