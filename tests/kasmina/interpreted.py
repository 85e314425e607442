"""The Triton kernels on Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.kasmina.interpreted`.

A process of its own: the variable is read when a kernel is defined, and Triton is no part of the environment.
"""

import json
import sys
from collections import Counter
from typing import Any

import torch

from esper.kasmina import fused
from esper.kasmina.checks import check_triton
from esper.kasmina.steps import drain_health
from esper.leyline.states import SeedState
from tests.kasmina.conftest import Rig, batch, gradients, mlp, wake


def step(calls: Counter[str]) -> dict[str, Any]:
    """One sampled step of a layer in two chunks: three children, two of them at the same chunk, one a shadow."""
    rig = Rig(mlp(), batch(), config={"seeds_per_layer": 2, "telemetry_every": 1})
    wake(rig.grow("2#0.0", SeedState.GRAFTING, alpha=0.5))
    wake(rig.grow("2#0.1", SeedState.GRAFTING, blueprint="BP-PROJ-LORA", alpha=1.0))
    wake(rig.grow("2#1.0", SeedState.TRAINING))
    rig.model.zero_grad()
    rig.stepper.begin(0)
    calls.clear()
    out = rig.forward_backward()
    rig.stepper.begin(1)
    assert not any(graft.fault for graft in rig.bank.grafted().values())
    found = {"out": out} | gradients(rig.model)
    return found | {"health": drain_health([rig.bank.layer("2")])[0].nan_to_num(-1.0)}


def counted(calls: Counter[str]) -> None:
    """Count how often the dispatch reaches Triton."""
    from esper.kasmina import kernels_triton

    def count(name: str) -> Any:
        real = getattr(kernels_triton, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return real(*args)

        return call

    for name in ("blend", "chunk_moments"):
        setattr(kernels_triton, name, count(name))


def main() -> None:
    """Check the kernels by themselves, then a layer that runs them against one that does not."""
    torch.set_num_threads(1)
    check_triton("cpu")
    assert fused.runs_triton(torch.ones(2)) and not fused.runs_triton(torch.ones(2, dtype=torch.float64))
    assert not fused.runs_triton(torch.ones(2), torch.ones(2, device="meta"))
    calls: Counter[str] = Counter()
    counted(calls)
    by_triton, reached = step(calls), dict(calls)
    fused._has_engine = lambda device_type: False
    by_torch = step(calls)
    assert not calls and by_triton.keys() == by_torch.keys()
    for name, value in by_torch.items():
        torch.testing.assert_close(by_triton[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    sys.stdout.write(json.dumps(reached) + "\n")


if __name__ == "__main__":
    main()
