"""Kernels compiled once per test run, whichever process needs them first."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from esper.blueprints import SiteShape, load_library
from esper.blueprints.dims import resolve_dims
from esper.blueprints.hashing import canonical_json
from esper.leyline.artifacts import CompilationRequest, CompiledKernel, KernelManifest, KernelSpec, Pipeline
from esper.leyline.codec import to_json

SITE = SiteShape("btd", 32, 32, 16, "block")


def spec(name: str = "BP-MLP-GELU", site: SiteShape = SITE) -> KernelSpec:
    """The kernel of a blueprint of the library at a small site, its default sizes spelled out as a run's request is."""
    ir = load_library()[name].ir
    dims = {size: value for size, value in resolve_dims(ir, site, {}).items() if ir.dims[size].free}
    return KernelSpec(ir=canonical_json(ir.model_dump(mode="json")).decode(), dims=dims, **site._asdict())


def built(shared: Path, of: KernelSpec, pipeline: Pipeline = "standard") -> Path:
    """Return the folder of a kernel; it is compiled once for all tests, in a process of its own as a worker's."""
    name = hashlib.sha256(canonical_json([of.model_dump(mode="json"), pipeline])).hexdigest()[:16]
    folder = shared / name
    with FileLock(shared / "lock", timeout=900):
        if not folder.exists():
            part = shared / f"part-{name}"
            part.mkdir()
            (part / "request.json").write_text(to_json(CompilationRequest(spec=of, pipeline=pipeline)))
            command = [sys.executable, "-m", "esper.tezzeret.compile", str(part), "--shelf", str(shared / "shelf")]
            subprocess.run(command, check=True, capture_output=True, timeout=600)
            part.rename(folder)
    return folder


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all processes of this test run see."""
    base = factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "kernels"
    folder.mkdir(exist_ok=True)
    return folder


def compiled(factory: pytest.TempPathFactory, name: str = "BP-MLP-GELU") -> tuple[Path, KernelManifest]:
    """Return the folder and the manifest of a compiled kernel."""
    folder = built(shared_folder(factory), spec(name))
    return folder, KernelManifest.model_validate_json((folder / "manifest.json").read_bytes())


def parcel(folder: Path) -> CompiledKernel:
    """Return a compiled kernel as a worker sends it."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    files = {name: (folder / name).read_bytes() for name in manifest["files"]}
    return CompiledKernel(
        manifest=(folder / "manifest.json").read_text(), files=files, record=(folder / "record.json").read_text()
    )
