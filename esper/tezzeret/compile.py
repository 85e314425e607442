"""Compiles one kernel: `python -m esper.tezzeret.compile FOLDER` reads `request.json` there and writes the artifact."""

import argparse
import hashlib
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch

from esper.blueprints import BlueprintIR
from esper.blueprints.hashing import canonical_json
from esper.leyline.artifacts import CompilationRequest, KernelManifest, KernelSpec, Pipeline
from esper.leyline.codec import from_json
from esper.leyline.errors import EsperError, KernelError, WrongFingerprint
from esper.leyline.kernels import CompilationRecord
from esper.tezzeret.job import ARTIFACT, UNFIT
from esper.tezzeret.pipelines import OPTIONS, flags, resolve
from esper.tezzeret.specs import blueprint_of
from esper.tezzeret.toolchain import fingerprint, kernel_id, toolchain

_MEBIBYTE: Final = 1024.0 if sys.platform == "linux" else 1024.0**2
"""Units of `ru_maxrss` in a mebibyte: it counts kibibytes on Linux, bytes on macOS."""


class Compiled(NamedTuple):
    """A finished compilation: what the artifact is, and what it took."""

    manifest: KernelManifest
    record: CompilationRecord


class _Convention(NamedTuple):
    """How the compiled functions are called; nothing for the fast tier."""

    parameters: tuple[str, ...] = ()
    forward_outputs: int = 0
    backward_wiring: tuple[str, ...] = ()


def compile_kernel(spec: KernelSpec, pipeline: Pipeline, folder: Path, shelf: Path | None = None) -> Compiled:
    """Compile a kernel into a folder; every other file that the compiler makes is gone when this returns.

    Args:
        spec: the kernel.
        pipeline: how to compile it; on a CPU, `aggressive` is `standard`.
        folder: gets `manifest.json`, `ir.json` and, unless the pipeline is `fast`, `fw.so` and `bw.so`.
        shelf: folder with what compilations can share, see `workshop`; None shares nothing.

    Raises:
        BlueprintError: the blueprint is malformed or does not fit.
        KernelError: it cannot be traced or compiled; the folder holds no new file then.
    """
    began, spent = time.perf_counter(), _cpu_seconds()
    runs, ir = resolve(pipeline, spec.target), blueprint_of(spec)
    name = kernel_id(spec, runs)
    convention = _Convention() if runs == "fast" else _compile_pair(spec, runs, folder, shelf)
    (folder / "ir.json").write_bytes(canonical_json(ir.model_dump(mode="json")))
    manifest = _manifest(name, ir, spec, runs, folder, convention)
    (folder / "manifest.json").write_bytes(canonical_json(manifest.model_dump(mode="json")))
    record = CompilationRecord(
        pipeline=runs,
        compilation_seconds=time.perf_counter() - began,
        cpu_seconds=_cpu_seconds() - spent,
        peak_memory_mb=_peak_memory_mb(),
        toolchain_version=toolchain(),
        optimization_flags=flags(pipeline, spec.target),
    )
    return Compiled(manifest, record)


def _compile_pair(spec: KernelSpec, pipeline: Pipeline, folder: Path, shelf: Path | None) -> _Convention:
    if spec.target == "cuda" and not torch.cuda.is_available():
        raise KernelError("a kernel for CUDA is compiled where a CUDA device is; this process sees none.")
    # The compiler takes seconds to import; who asks for the fast tier only, as the forge does, need not have it.
    from esper.tezzeret.codegen import compile_graph
    from esper.tezzeret.trace import check_any_batch, trace
    from esper.tezzeret.workshop import workshop

    with workshop(folder, shelf) as bench:
        traced = trace(spec)
        made = {
            "fw.so": compile_graph(traced.forward, traced.mode, bench / "fw", OPTIONS[pipeline]),
            "bw.so": compile_graph(traced.backward, traced.mode, bench / "bw", OPTIONS[pipeline]),
        }
        check_any_batch(traced.mode)
        for name, library in made.items():
            library.replace(folder / name)
    return _Convention(traced.parameters, traced.forward_outputs, traced.wiring)


def _manifest(
    name: str, ir: BlueprintIR, spec: KernelSpec, pipeline: Pipeline, folder: Path, convention: _Convention
) -> KernelManifest:
    files = ARTIFACT[:1] if pipeline == "fast" else ARTIFACT
    return KernelManifest(
        kernel_id=name,
        name=ir.name,
        version=ir.version,
        blueprint_id=ir.id,
        spec=spec,
        pipeline=pipeline,
        toolchain=toolchain(),
        fingerprint="" if pipeline == "fast" else fingerprint(),
        files={file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files},
        created=time.time(),
        **convention._asdict(),
    )


def _cpu_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _peak_memory_mb() -> float:
    whos = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in whos) / _MEBIBYTE


def _check_machine(wanted: str) -> None:
    """Raise unless what is compiled here is what was asked for: the compiler makes code for its own machine."""
    if wanted not in ("", fingerprint()):
        raise WrongFingerprint(
            f"a kernel for the binary interface {wanted[:12]} is asked for; this machine makes some for "
            f"{fingerprint()[:12]}, and the kernel is compiled on one like that which asked."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what `request.json` of a folder asks, and write `record.json`, or `error.txt` with the reason.

    Where the kernel is for another machine than this one, nothing is compiled, and `unfit.txt` says so.

    Returns:
        The exit status: 0, or 1 where the kernel cannot be compiled, or not here.
    """
    parser = argparse.ArgumentParser(prog="python -m esper.tezzeret.compile", description=__doc__)
    parser.add_argument("folder", type=Path, help="holds request.json, gets the artifact")
    parser.add_argument("--shelf", type=Path, default=None, help="holds what compilations share")
    parser.add_argument("--fingerprint", default="", help="binary interface that the kernel is for; empty for ours")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        _check_machine(given.fingerprint)
        asked = from_json(CompilationRequest, (given.folder / "request.json").read_bytes())
        made = compile_kernel(asked.spec, asked.pipeline or "standard", given.folder, given.shelf)
    except WrongFingerprint as error:
        (given.folder / UNFIT).write_text(str(error), encoding="utf-8")
        return 1
    except EsperError as error:
        (given.folder / "error.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        return 1
    (given.folder / "record.json").write_bytes(canonical_json(made.record.model_dump(mode="json")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
