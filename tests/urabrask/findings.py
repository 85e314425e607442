"""Findings for tests that are about what is made of them."""

from typing import Any

from esper.leyline.reports import HardwareContext
from esper.urabrask.findings import Findings, Measured

HERE = HardwareContext(device_type="cpu", device_name="Abacus 3000")


def measured(ratio: float = 0.7, spread: float = 0.02, **fields: Any) -> Measured:
    whole = {
        "batch": 8,
        "calls": 500,
        "forward_ms": 0.5,
        "forward_ms_p99": 0.6,
        "step_ms": ratio,
        "eager_forward_ms": 0.6,
        "eager_step_ms": 1.0,
        "step_ratio": ratio,
        "ratio_spread": spread,
        "latency_spread": spread,
        "memory_mb": 1.0,
        "eager_memory_mb": 1.0,
        "drift": 5e-7,
        "eager_drift": 5e-7,
    }
    return Measured(**{**whole, **fields})


def findings(ratio: float = 0.7, spread: float = 0.02, **fields: Any) -> Findings:
    whole = {
        "kernel_id": "k",
        "pipeline": "standard",
        "checks": ("batches",),
        "margin": 0.1,
        "nodes": 4,
        "library_mb": 0.6,
        "measured": measured(ratio, spread),
        "hardware": HERE,
    }
    return Findings(**{**whole, **fields})
