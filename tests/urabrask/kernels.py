"""Compiled kernels for tests, and doctored ones: real shared libraries in front of them that do one bad thing."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esper.blueprints import load_library
from esper.blueprints.hashing import canonical_json
from esper.leyline.artifacts import CompiledKernel, KernelManifest, KernelSpec, Pipeline
from esper.leyline.codec import to_json
from esper.leyline.kernels import Blueprint
from esper.urza.canonical import parse

SOURCE = Path(__file__).with_name("doctor.c")


def spec(name: str = "BP-MLP-GELU", d: int = 32, tokens: int = 16, **fields: object) -> KernelSpec:
    ir = load_library()[name].ir
    layout = ir.layouts[0]
    whole = {"layout": layout, "d_in": d, "d_out": d, "tokens": tokens, "kind": (ir.site_kinds or ("block",))[0]}
    return KernelSpec(ir=canonical_json(ir.model_dump(mode="json")).decode(), **{**whole, **fields})


def blueprint(of: KernelSpec) -> Blueprint:
    data = json.loads(of.ir)
    return Blueprint(id=hashlib.sha256(of.ir.encode()).hexdigest(), name=data["name"], ir=of.ir)


def manifest_of(folder: Path) -> KernelManifest:
    return parse(KernelManifest, (folder / "manifest.json").read_bytes())


def packed(folder: Path) -> CompiledKernel:
    """Return an artifact as Tezzeret's worker sends it, its manifest naming the files that are there."""
    files = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".so" or path.name == "ir.json"
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = manifest_of(folder).model_copy(update={"files": hashes})
    record = folder / "record.json"
    return CompiledKernel(
        manifest=canonical_json(manifest.model_dump(mode="json")).decode(),
        files=files,
        record=record.read_text() if record.exists() else "",
    )


def doctored(good: Path, folder: Path, bad: str, part: str = "fw", kept: int = 1) -> Path:
    """Copy a kernel and put a library in front of its forward or backward that does one bad thing from a call on."""
    if sys.platform != "linux":
        pytest.skip("the library in front of a kernel is built for Linux")
    shutil.copytree(good, folder)
    real = folder / f"{part}_real.so"
    (folder / f"{part}.so").rename(real)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", f"-DBAD={bad}", f"-DKEPT={kept}", "-o", f"{part}.so", str(SOURCE)]
        + ["-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", "-L.", f"-l:{real.name}"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder


def eager_kernel(of: KernelSpec, kernel_id: str = "", pipeline: Pipeline = "fast", **files: bytes) -> CompiledKernel:
    """Return an artifact of the fast tier, or one that says it is of another and has files of arbitrary bytes."""
    held = {"ir.json": of.ir.encode(), **{f"{name}.so": data for name, data in files.items()}}
    manifest = KernelManifest(
        kernel_id=kernel_id or f"kernel-{blueprint(of).id[:16]}-{pipeline}",
        name=blueprint(of).name,
        blueprint_id=blueprint(of).id,
        spec=of,
        pipeline=pipeline,
        files={name: hashlib.sha256(data).hexdigest() for name, data in held.items()},
    )
    return CompiledKernel(manifest=to_json(manifest), files=held)
