"""What compiles here and for which machine: the toolchain's name, the binary fingerprint and the ids of kernels."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from typing import Final

import torch

from esper.blueprints.hashing import content_hash
from esper.kasmina.fingerprint import fingerprint as fingerprint
from esper.leyline.artifacts import KernelSpec, Pipeline
from esper.leyline.errors import KernelError
from esper.tezzeret.pipelines import OPTIONS, resolve
from esper.tezzeret.specs import planned

RECIPE: Final = 1
"""Version of the steps from blueprint to files; raise it when they change, and every kernel becomes outdated."""

_LONGEST_SIZES: Final = 40
_PATIENCE_S: Final = 10.0


@cache
def compiler() -> str:
    """Return the path of the C++ compiler.

    Raises:
        KernelError: there is none.
    """
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(name)
    if found is None:
        raise KernelError(f"no C++ compiler {name!r} on the path; install one, set CXX, or use the pipeline 'fast'.")
    return found


@cache
def toolchain() -> str:
    """Return the versions of compiler and libraries, and the options that they get, in one line.

    Example:
        >>> toolchain().startswith(f"torch {torch.__version__}; python 3.")
        True
    """
    options = content_hash({name: dict(chosen) for name, chosen in OPTIONS.items()})[:8]
    python = platform.python_version()
    return f"torch {torch.__version__}; python {python}; {_compiler_version()}; options {options}; recipe {RECIPE}"


def toolchain_hash(pipeline: Pipeline = "standard") -> str:
    """Return 12 hexadecimal digits that name what made a kernel: the toolchain, and the binary interface of its files.

    Kernels of machines that differ have different ids so, and lie in one store side by side. The fast tier has no
    compiled files, and its kernels are the same on every machine.

    Example:
        >>> len(toolchain_hash())
        12
    """
    named = toolchain() if pipeline == "fast" else f"{toolchain()}; fingerprint {fingerprint()}"
    return hashlib.sha256(named.encode()).hexdigest()[:12]


def kernel_id(spec: KernelSpec, pipeline: Pipeline) -> str:
    """Return `<ir hash>-<target>-<pipeline>-<toolchain hash>`, the target being device, shape, precision and sizes.

    Specs that mean the same kernel have the same id: sizes left out take their defaults.

    Raises:
        BlueprintError: the spec's blueprint is malformed or does not fit its site.
    """
    ir, site, plan = planned(spec)
    sizes = ".".join(f"{name}{plan.dims[name]}" for name in sorted(plan.dims))
    if len(sizes) > _LONGEST_SIZES:
        sizes = content_hash(plan.dims)[:16]
    shape = f"{site.layout}.{site.d_in}.{site.d_out}.{site.tokens}"
    target = ".".join(filter(None, [spec.target, shape, spec.dtype, sizes]))
    return f"{ir.id[:16]}-{target}-{resolve(pipeline, spec.target)}-{toolchain_hash(pipeline)}"


def _compiler_version() -> str:
    try:
        answer = subprocess.run([compiler(), "--version"], capture_output=True, text=True, timeout=_PATIENCE_S)
    except (KernelError, OSError, subprocess.TimeoutExpired):
        return "no C++ compiler"
    return answer.stdout.partition("\n")[0].strip() or "unknown C++ compiler"
