"""Time the seeds against their budgets: `python benchmarks/kasmina.py [--quick] [--check]`.

Dormant overhead is the ratio of forward and backward with seeds to without, on `ByteLM`: blocks of 20 steps, one of
them sampled, of the two models alternate, and the median of the paired ratios is shown, beside that of two bare copies
(the noise floor); `benchmarks/overhead.py` measures whole families of models more finely. A graft step is the first
step with a new child against the mean of its steady steps, in an eager host and in one whose blocks are compiled
(left out by `--quick`: compiling takes minutes). One thread.
`--check` makes a missed budget exit with status 1; the dormant budget is widened by twice the noise floor.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from esper.bench.speed.graft import BUDGET as GRAFT_BUDGET
from esper.bench.speed.graft import PLACE, STREAM, compile_blocks, grafts
from esper.bench.speed.kernels import hit_line
from esper.blueprints import SiteShape
from esper.kasmina.kernels import Kernel, KernelRequest
from esper.kasmina.library_store import LibraryKernelStore
from esper.kasmina.steps import SeedStepper
from esper.kasmina.wrapper import MorphableModel, wrap
from esper.models import ByteLM

BLOCK_STEPS = 20
DORMANT_BUDGET = 1.01


class Row(NamedTuple):
    """One line of the table: what, the value, its unit, the budget and a remark."""

    name: str
    value: float
    unit: str
    budget: float | None
    remark: str = ""

    @property
    def met(self) -> bool:
        """Whether the value is within its budget."""
        return self.budget is None or self.value <= self.budget


def make_step(model: nn.Module) -> Callable[[], None]:
    """Return one forward and backward pass on a fixed batch."""
    tokens = torch.randint(0, 256, (4, 128), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.zero_grad()
        model(tokens).logsumexp(-1).mean().backward()

    return step


def seconds(call: Callable[[], object], times: int) -> float:
    """Return the processor time of some calls, in seconds."""
    start = time.process_time()
    for _ in range(times):
        call()
    return time.process_time() - start


def paired_ratio(one: Callable[[], None], two: Callable[[], None], pairs: int) -> float:
    """Return the median over pairs of blocks of the time of `one` over that of `two`, each going first in turn."""
    ratios = []
    for pair in range(pairs):
        order = (one, two) if pair % 2 else (two, one)
        times = {call: seconds(call, BLOCK_STEPS) for call in order}
        ratios.append(times[one] / times[two])
    return statistics.median(ratios)


def bare() -> ByteLM:
    """Return the host, always with the same weights."""
    torch.manual_seed(0)
    return ByteLM()


def probed(model: MorphableModel) -> MorphableModel:
    """Let a batch pass and end the probing of the sites."""
    make_step(model)()
    with torch.no_grad():
        model.eval()(torch.zeros(1, 8, dtype=torch.long))
    model.train()
    for layer in model.bank.all_layers():
        layer.finish_probe()
    return model


def telemetric_step(model: MorphableModel) -> Callable[[], None]:
    """Return a step that samples health as in a run: every n-th time."""
    stepper, step, count = SeedStepper(model.bank), make_step(model), iter(range(10**9))

    def whole() -> None:
        stepper.begin(next(count))
        step()
        stepper.observe_gradients()

    return whole


def dormant(pairs: int) -> Iterator[Row]:
    """Yield the overhead of seeds that do nothing, with telemetry."""
    reference = make_step(bare())
    noise = paired_ratio(make_step(bare()), reference, pairs)
    yield Row("two bare copies (noise floor)", noise, "ratio", None)
    budget = DORMANT_BUDGET + 2 * abs(noise - 1.0)
    for name, targets, chunks in (("residual stream", STREAM, 1), ("default sites", None, 1), ("stream", STREAM, 64)):
        model = probed(wrap(bare(), targets=targets, seeds_per_layer=chunks))
        ratio, sites = paired_ratio(telemetric_step(model), reference, pairs), len(model.bank.layers)
        remark = f"{(ratio - 1) / sites:+.3%} per site"
        yield Row(f"dormant, {name}: {sites} sites x {chunks}", ratio, "ratio", budget, remark)


def wait(store: LibraryKernelStore, request: KernelRequest) -> Kernel:
    """Poll until the kernel is there."""
    while (kernel := store.poll(request)) is None:
        time.sleep(0.001)
    return kernel


def kernels(times: int) -> Iterator[Row]:
    """Yield the cost of a cached hit and of a whole ingestion."""
    store = LibraryKernelStore()
    request = KernelRequest("BP-MLP-GELU", SiteShape("btd", 64, 64, 128, "stream"), "declared", (("h", 16),))
    start = time.perf_counter()
    wait(store, request)
    yield Row("kernel, verified and warmed up off the thread", 1e3 * (time.perf_counter() - start), "ms", None)
    store.close()
    hit = hit_line(times)
    yield Row(hit.what, hit.value, hit.unit, hit.target)


def graft_steps(kind: str, model: MorphableModel, count: int, place: str = PLACE) -> Iterator[Row]:
    """Yield the first step with a new child over its steady steps, and what the compiler did meanwhile."""
    found = grafts(model, make_step(model), count, place)
    yield Row(f"graft step, {kind}: first over steady", statistics.median(found.first), "ratio", GRAFT_BUDGET)
    if kind != "eager":
        yield Row(f"graft step, {kind}: graphs compiled by {count} grafts", found.recompiled, "", 0.0)


def compiled(host: ByteLM) -> ByteLM:
    """Compile every block of a host with inductor."""
    compile_blocks(host, "inductor")
    return host


def compiled_rows(pairs: int, repeats: int) -> Iterator[Row]:
    """Yield the same of hosts whose blocks are compiled, and what their dormant seeds cost there."""
    reference = make_step(compiled(bare()))
    seconds(reference, 3)
    places = (("residual stream", STREAM, "blocks.0.after_attn"), ("default sites", None, "blocks.0.attn"))
    for name, targets, path in places:
        model = probed(wrap(bare(), targets=targets))
        compile_blocks(model.host, "inductor")
        step = telemetric_step(model)
        seconds(step, 3)
        ratio, sites = paired_ratio(step, reference, pairs), len(model.bank.layers)
        yield Row(f"compiled, dormant, {name}: {sites} sites", ratio, "ratio", None, "the graph breaks at a site")
        yield from graft_steps(f"compiled, {name}", model, repeats, path)


def main() -> int:
    """Measure, print, and tell whether every budget was met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds, with more noise")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a budget is missed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = 3 if args.quick else 15
    table = Table("what", "value", "unit", "budget", "remark", box=SIMPLE_HEAD)
    repeats = 3 if args.quick else 9
    rows = [*dormant(pairs), *kernels(20_000), *graft_steps("eager", probed(wrap(bare(), targets=STREAM)), repeats)]
    rows += compiled_rows(pairs, repeats) if not args.quick else []
    for row in rows:
        colour = "" if row.met else "[red]"
        budget = "" if row.budget is None else f"{row.budget:.3f}"
        table.add_row(row.name, f"{colour}{row.value:.3f}", row.unit, budget, row.remark)
    Console(width=120).print(table)
    return int(args.check and not all(row.met for row in rows))


if __name__ == "__main__":
    sys.exit(main())
