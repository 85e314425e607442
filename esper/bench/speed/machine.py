"""On what the numbers were measured."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from esper import __version__

_OPTIONAL: Final = ("lightning", "peft")


def machine() -> dict[str, Any]:
    """Return the machine, how busy it is at this moment, and the versions, as plain data.

    Example:
        >>> sorted(machine())
        ['cores', 'load_average', 'memory_gib', 'platform', 'processor', 'versions']
    """
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"esper": __version__, "python": platform.python_version(), "torch": torch.__version__} | _others(),
    }


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return the processor's own name, or its architecture where it has none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _others() -> dict[str, str]:
    found = {}
    for name in _OPTIONAL:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
