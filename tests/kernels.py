"""Kernels compiled once per test run, whichever process needs them first."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

from esper.blueprints import SiteShape, load_library
from esper.blueprints.hashing import canonical_json
from esper.leyline.artifacts import CompilationRequest, CompiledKernel, KernelManifest, KernelSpec
from esper.leyline.codec import to_json

SITE = SiteShape("btd", 16, 16, 8, "block")


def spec(name: str = "BP-MLP-GELU", site: SiteShape = SITE) -> KernelSpec:
    """The kernel of a blueprint of the library at a small site."""
    text = canonical_json(load_library()[name].ir.model_dump(mode="json")).decode()
    return KernelSpec(ir=text, layout=site.layout, d_in=site.d_in, d_out=site.d_out, tokens=site.tokens, kind=site.kind)


@cache
def folder_of(shared: Path, name: str) -> Path:
    """Compile in a process of its own, as a worker does."""
    folder = shared / "kernels" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "record.json").exists():
            folder.mkdir(exist_ok=True)
            asked = CompilationRequest(spec=spec(name), pipeline="standard")
            (folder / "request.json").write_text(to_json(asked), encoding="utf-8")
            command = [sys.executable, "-W", "ignore", "-m", "esper.tezzeret.compile", str(folder)]
            subprocess.run([*command, "--shelf", str(shared / "kernels" / "shelf")], check=True, timeout=300)
    return folder


def compiled(factory: pytest.TempPathFactory, name: str = "BP-MLP-GELU") -> tuple[Path, KernelManifest]:
    """Return the folder and the manifest of a compiled kernel."""
    base = factory.getbasetemp()
    folder = folder_of(base.parent if base.name.startswith("popen-") else base, name)
    return folder, KernelManifest.model_validate_json((folder / "manifest.json").read_bytes())


def parcel(folder: Path) -> CompiledKernel:
    """Return a compiled kernel as a worker sends it."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    files = {name: (folder / name).read_bytes() for name in manifest["files"]}
    return CompiledKernel(
        manifest=(folder / "manifest.json").read_text(), files=files, record=(folder / "record.json").read_text()
    )
