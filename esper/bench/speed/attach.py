"""What attaching to a large transformer costs, beside PEFT's injection of adapters at the same sites."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Final

import torch
from torch import nn

from esper.bench.speed.line import Line
from esper.kasmina.wrapper import wrap
from esper.models import ByteLM

BUDGET: Final = 2.0
"""Most that attaching may take of PEFT's injection."""

PROJECTIONS: Final = ("qkv", "proj", "up", "down")
_RANK: Final = 8
Attach = Callable[[nn.Module], int]
"""Attaches to a fresh model, and returns the number of sites."""


def large(layers: int = 14, width: int = 768) -> nn.Module:
    """Return a transformer, by default of 100 M parameters; nobody waits for a random draw of them."""
    with torch.device("meta"):
        model = ByteLM(d_model=width, layers=layers, heads=width // 64, ffn=4 * width)
    return model.to_empty(device="cpu")


def rounds(make: Callable[[], nn.Module], routes: Mapping[str, Attach], count: int) -> dict[str, tuple[int, float]]:
    """Return sites and median milliseconds by route; they take turns, each on a model that is made outside the clock.

    Args:
        make: makes a model.
        routes: what is timed, by name.
        count: turns of each, after one that imports and fills caches.
    """
    times: dict[str, list[float]] = {name: [] for name in routes}
    sites: dict[str, int] = {}
    for number in range(count + 1):
        for name, attach in routes.items():
            model = make()
            gc.collect()
            start = time.perf_counter()
            sites[name] = attach(model)
            if number:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: (sites[name], statistics.median(times[name])) for name in routes}


def with_seeds(model: nn.Module) -> int:
    """Attach seeds at the projections; return the number of sites."""
    return len(wrap(model, targets=[f"blocks.*.{name}" for name in PROJECTIONS]).bank.layers)


def with_default_seeds(model: nn.Module) -> int:
    """Attach seeds wherever they go by default; return the number of sites."""
    return len(wrap(model).bank.layers)


def with_lora(model: nn.Module) -> int:
    """Let PEFT inject LoRA at the projections; return the number of sites."""
    # An optional package; its import takes seconds.
    from peft import LoraConfig, inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = inject_adapter_in_model(LoraConfig(r=_RANK, target_modules=list(PROJECTIONS)), model)
    return sum(name.endswith(".lora_A") for name, _ in adapted.named_modules())


def walked(model: nn.Module) -> int:
    """Walk over all modules and hang a hook on each projection; return the number of sites."""
    chosen = [module for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    for module in chosen:
        module.register_forward_hook(lambda *_: None)
    return len(chosen)


def lines(make: Callable[[], nn.Module], count: int, *, peft: bool | None = None) -> list[Line]:
    """Return the time to attach at the projections, and at the default sites.

    Args:
        make: makes a model.
        count: turns.
        peft: whether to compare with PEFT's; None: where it is installed.
    """
    there = find_spec("peft") is not None if peft is None else peft
    other: Attach = with_lora if there else walked
    found = rounds(make, {"same": with_seeds, "default": with_default_seeds, "other": other}, count)
    size = sum(p.numel() for p in make().parameters())
    model = f"a transformer of {size / 1e6:.0f} M"
    sites, limit = found["other"]
    of = f"PEFT's injection of LoRA at {sites} sites" if there else f"a bare walk with {sites} hooks; PEFT is not there"
    return [
        Line(
            what=f"attach to {model}, {found[kind][0]} {told} sites",
            value=found[kind][1],
            unit="ms",
            target=BUDGET * limit if there and kind == "same" else None,
            limit=limit,
            of=of,
            numbers={"ratio": found[kind][1] / limit, "turns": count, "sites": found[kind][0], "parameters": size},
        )
        for kind, told in (("same", "given"), ("default", "default"))
    ]
