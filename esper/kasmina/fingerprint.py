"""What compiled files rely on at run time, in one hash: they are loaded only where it is that of their compilation."""

import platform
import sys
from functools import cache
from pathlib import Path

import torch

from esper.blueprints.hashing import content_hash


@cache
def fingerprint() -> str:
    """Return the SHA-256 of everything that compiled files rely on at run time: torch, Python, CPU, C++ library.

    Files are compiled for the very CPU; loaded by another one they may stop on an illegal instruction.

    Example:
        >>> len(fingerprint())
        64
    """
    return content_hash(
        {
            "torch": torch.__version__,
            "torch_cpp_abi": bool(torch.compiled_with_cxx11_abi()),
            "python": sys.implementation.cache_tag,
            "machine": platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpu_features": _cpu_features(),
            "libraries": _libraries(),
        }
    )


def _cpu_features() -> list[str]:
    """Return what the first processor can do, as Linux tells it; elsewhere its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [platform.processor()]
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(found.partition(":")[2].split())


def _libraries() -> list[str]:
    """Return the C++ library of this process and torch's OpenMP, versions in their file names.

    Other packages bring an OpenMP of their own, which no kernel uses; whether they are imported must not matter.
    """
    packages = Path(torch.__file__).parents[1]
    own = [path.name for folder in ("torch/lib", "torch.libs") for path in (packages / folder).glob("lib[gi]omp*")]
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [platform.platform(), *sorted(own)]
    return sorted({Path(line.split(maxsplit=5)[5]).name for line in lines if "libstdc++" in line} | set(own))
