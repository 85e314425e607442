"""Time the message bus: `OMP_NUM_THREADS=1 python benchmarks/oona.py [--letters 5000] [--latencies 1000]`.

Control letters (journalled, confirmed, acknowledged) and telemetry (neither), inside one process and over ZeroMQ with
the broker in a process of its own, plain and encrypted. Publisher and subscriber are two threads of this process with
a connection each. The rate is that of letters received when they are published one after the other as fast as
`publish` returns; latencies are measured at 200 letters a second: `publish` is how long its caller is held up,
`delivery` the time from the call of `publish` to the return of `receive`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from esper.leyline import CONTROL_KASMINA_COMMANDS, TELEMETRY_SEED_HEALTH, HealthSignal, KernelReady, Message
from esper.oona import Bus, BusLimits, CurveKeys, MemoryBus, ZmqBus, admit
from esper.oona.contracts import is_journalled

PAUSE_S = 0.005
CONTROL = KernelReady(kernel_artifact_id="k" * 64, blueprint_id="b" * 64, pipeline="standard")
HEALTH = HealthSignal(layer_id="blocks.0.mlp", seed_id="blocks.0.mlp#0.0", epoch=1, step=100, metrics={"norm": 1.0})
MESSAGES: dict[str, Message] = {CONTROL_KASMINA_COMMANDS: CONTROL, TELEMETRY_SEED_HEALTH: HEALTH}


class Ends(NamedTuple):
    """The publisher's and the subscriber's bus."""

    publisher: Bus
    subscriber: Bus


class Row(NamedTuple):
    """One line of the table; latencies in seconds."""

    name: str
    topic: str
    rate: float
    lost: int
    held_s: list[float]
    delivered_s: list[float]


@contextmanager
def memory(limits: BusLimits) -> Iterator[Ends]:
    """Yield the bus inside one process."""
    with MemoryBus(limits) as bus:
        yield Ends(bus, bus)


@contextmanager
def zeromq(limits: BusLimits, encrypted: bool) -> Iterator[Ends]:
    """Yield two clients of a broker in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="oona") as name:
        folder, client, options = Path(name), None, []
        if encrypted:
            server, client = CurveKeys.generate(), CurveKeys.generate()
            admit(folder / "admitted", "benchmark", client.public)
            client, path = client.for_server(server.public), server.save(folder / "broker")
            options = ["--listen", "tcp://127.0.0.1:*", "--keys", path, "--admitted", folder / "admitted"]
        command = [sys.executable, "-m", "esper.oona.broker", "--folder", folder, *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as broker:
            assert broker.stdout is not None
            try:
                address = broker.stdout.readline().strip()
                with ZmqBus(address, "a", client, limits=limits) as one, ZmqBus(address, "b", client) as two:
                    yield Ends(one, two)
            finally:
                broker.terminate()


def measure(name: str, topic: str, ends: Ends, count: int, pause_s: float) -> tuple[float, int, list[list[float]]]:
    """Send `count` letters; return the rate, how many were lost, and the two kinds of latencies."""
    starts: list[float] = []
    ends_at: list[float] = []
    ready = threading.Event()

    def listen() -> None:
        with ends.subscriber.subscribe(topic, group="" if pause_s else "benchmark") as subscription:
            ready.set()
            while len(ends_at) < count and (delivery := subscription.receive(5.0)) is not None:
                ends_at.append(time.perf_counter())
                subscription.ack(delivery)

    thread = threading.Thread(target=listen)
    thread.start()
    ready.wait()
    held = []
    for _ in range(count):
        starts.append(time.perf_counter())
        ends.publisher.publish(MESSAGES[topic], topic)
        held.append(time.perf_counter() - starts[-1])
        time.sleep(pause_s)
    thread.join()
    delivered = [end - start for start, end in zip(starts, ends_at, strict=False)]
    return len(ends_at) / (ends_at[-1] - starts[0]), count - len(ends_at), [held, delivered]


def rows(letters: int, latencies: int) -> Iterator[Row]:
    """Measure every bus with both kinds of letters."""
    limits = BusLimits(telemetry_capacity=10 * letters)
    buses = {
        "memory": lambda: memory(limits),
        "ZeroMQ, ipc": lambda: zeromq(limits, encrypted=False),
        "ZeroMQ, tcp with CURVE": lambda: zeromq(limits, encrypted=True),
    }
    for name, make in buses.items():
        for topic in MESSAGES:
            with make() as ends:
                measure(name, topic, ends, 100, 0.0)
                rate, lost, _ = measure(name, topic, ends, letters, 0.0)
                _, _, (held, delivered) = measure(name, topic, ends, latencies, PAUSE_S)
            yield Row(name, topic, rate, lost, held, delivered)


def table_of(found: list[Row]) -> Table:
    """Lay the figures out."""
    table = Table(title="Oona: letters a second, latencies in us", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("bus", no_wrap=True)
    table.add_column("letters", no_wrap=True)
    for column in ("a second", "lost", "publish p50", "p99", "delivery p50", "p99"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found:
        times = [1e6 * value for values in (row.held_s, row.delivered_s) for value in quantiles(values)]
        kind = "control" if is_journalled(row.topic) else "telemetry"
        table.add_row(row.name, kind, f"{row.rate:,.0f}", f"{row.lost:,}", *(f"{value:,.0f}" for value in times))
    return table


def quantiles(values: list[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile."""
    return statistics.median(values), statistics.quantiles(values, n=100)[98]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--letters", type=int, default=5_000, help="letters per rate (default 5000)")
    parser.add_argument("--latencies", type=int, default=1_000, help="letters per latency (default 1000)")
    options = parser.parse_args()
    Console(width=120).print(table_of(list(rows(options.letters, options.latencies))))


if __name__ == "__main__":
    main()
