"""Time Leyline's codec against its budgets: `python benchmarks/leyline.py [--check]`.

Every control message (the examples that the golden files pin) must encode and decode in under 80 us together, and a
packet of 10,000 seeds in under 5 ms. The medians are printed; `--check` makes a missed budget exit with status 1.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from esper import leyline as ll

GOLDEN = Path(__file__).parents[1] / "tests" / "leyline" / "golden"
CONTROL_BUDGET_US = 80.0
PACKET_BUDGET_US = 5_000.0
SEEDS = 10_000


class Timing(NamedTuple):
    """One message: its size in bytes, its median times and its budget in microseconds."""

    name: str
    size: int
    encode_us: float
    decode_us: float
    budget_us: float

    @property
    def ratio(self) -> float:
        """Time over budget; at most 1 is within it."""
        return (self.encode_us + self.decode_us) / self.budget_us


def median_us(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of one call, in microseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1_000


def measure(name: str, message: ll.Message, budget_us: float, repeats: int) -> Timing:
    """Time both directions of one message."""
    data = ll.encode(message)
    encode_us = median_us(lambda: ll.encode(message), repeats)
    decode_us = median_us(lambda: ll.decode(ll.REGISTRY, data), repeats)
    return Timing(name, len(data), encode_us, decode_us, budget_us)


def large_packet() -> ll.SystemStatePacket:
    """Return a packet of 10,000 seeds in 100 layers, with full telemetry and topology."""
    rng = np.random.default_rng(0)
    per_layer = SEEDS // 100
    layers = [f"transformer.blocks.{layer}.mlp" for layer in range(100)]
    ids = [f"{layer}#{chunk}.0" for layer in layers for chunk in range(per_layer)]
    edges = [(SEEDS + row // per_layer, row, ll.EdgeKind.CONTAINS) for row in range(SEEDS)]
    return ll.SystemStatePacket(
        run_id="benchmark",
        current_epoch=3,
        global_step=1_000,
        train_loss=1.0,
        validation_loss=1.0,
        seed_states=ll.SeedTable.of(ids, state=rng.integers(0, 12, SEEDS), alpha=rng.random(SEEDS)),
        health_map=ll.HealthMap.of(**{name: rng.random(SEEDS) for name in ll.HEALTH_COLUMNS}),
        edges=ll.Edges.of(layers, edges),
    )


def timings(repeats: int) -> Iterator[Timing]:
    """Time every control message, then the large packet."""
    for path in sorted(GOLDEN.glob("*.msgpack")):
        message = ll.decode(ll.REGISTRY, path.read_bytes())
        if not isinstance(message, ll.SystemStatePacket):
            yield measure(path.stem, message, CONTROL_BUDGET_US, repeats)
    yield measure(f"packet of {SEEDS:,} seeds", large_packet(), PACKET_BUDGET_US, max(repeats // 20, 10))


def table_of(results: list[Timing]) -> Table:
    """Lay the timings out."""
    table = Table(title="Leyline: encode and decode, median us", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("message", no_wrap=True)
    for column in ("bytes", "encode", "decode", "sum", "budget", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results:
        times = (row.encode_us, row.decode_us, row.encode_us + row.decode_us)
        style = "red" if row.ratio > 1 else ""
        cells = (f"{row.size:,}", *(f"{value:,.1f}" for value in times), f"{row.budget_us:,.0f}", f"{row.ratio:.0%}")
        table.add_row(row.name, *cells, style=style)
    return table


def main() -> int:
    """Print the table; return 1 if a budget was missed and `--check` was given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a budget is missed")
    parser.add_argument("--repeats", type=int, default=2_000, help="calls per message and direction (default 2000)")
    options = parser.parse_args()
    results = list(timings(options.repeats))
    Console().print(table_of(results))
    return int(options.check and any(row.ratio > 1 for row in results))


if __name__ == "__main__":
    sys.exit(main())
