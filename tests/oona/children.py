"""Processes for the tests of the bus that are killed, stopped and started again."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from esper.leyline import KernelReady
from esper.oona import ZmqBus

TOPIC = "compilation.ready"
GROUP = "readers"


def letter(number: int) -> KernelReady:
    return KernelReady(kernel_artifact_id=str(number), blueprint_id="b", pipeline="fast")


def number_of(message: object) -> int:
    assert isinstance(message, KernelReady)
    return int(message.kernel_artifact_id)


class Child:
    """A process that dies with the test."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)

    def first_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class BrokerProcess(Child):
    """`python -m esper.oona.broker`, listening before the constructor returns."""

    def __init__(self, folder: Path, listen: str | None = None) -> None:
        options = [] if listen is None else ["--listen", listen]
        super().__init__("-m", "esper.oona.broker", "--folder", str(folder), *options)
        self.address = self.first_line()
        assert self.address, "the broker did not start"


class ConsumerProcess(Child):
    """Writes the number of every letter to a file, a line each, and then acknowledges it."""

    def __init__(self, address: str, record: Path) -> None:
        super().__init__("-m", "tests.oona.children", address, str(record))
        assert self.first_line() == "listening"


def numbers(record: Path) -> list[int]:
    return [int(line) for line in record.read_text().splitlines()] if record.exists() else []


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def consume(address: str, record: Path) -> None:
    with ZmqBus(address, "consumer") as bus, bus.subscribe("compilation", group=GROUP) as subscription:
        print("listening", flush=True)
        with record.open("a") as file:
            while True:
                delivery = subscription.receive(1.0)
                if delivery is not None:
                    file.write(f"{number_of(delivery.message)}\n")
                    file.flush()
                    subscription.ack(delivery)


if __name__ == "__main__":
    consume(sys.argv[1], Path(sys.argv[2]))
