"""The machine that a number was measured on."""

import platform
from pathlib import Path

import psutil

from esper.leyline.reports import HardwareContext


def hardware() -> HardwareContext:
    """Return the processor of this process; memory is what is free at this instant.

    Example:
        >>> hardware().device_type
        'cpu'
    """
    return HardwareContext(
        device_type="cpu",
        device_name=_processor(),
        memory_available_gb=psutil.virtual_memory().available / 2**30,
        supports_bf16=True,
        supports_quantization=True,
    )


def _processor() -> str:
    """Return what the first processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = next((line for line in lines if line.startswith("model name")), "")
    return named.partition(":")[2].strip() or platform.machine()
