"""Both buses keep the one contract."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esper.oona import Bus, BusLimits, CurveKeys, MemoryBus, ZmqBus, admit
from esper.oona.broker import Broker
from esper.oona.checks import check_bus

Factory = Callable[[BusLimits], Bus]


class Brokers:
    """Starts a broker for every bus that is asked for, and stops them all."""

    def __init__(self, encrypted: bool) -> None:
        self.encrypted = encrypted
        self.started: list[Broker] = []

    def __call__(self, limits: BusLimits) -> Bus:
        folder = Path(tempfile.mkdtemp(prefix="oona"))
        server = client = None
        if self.encrypted:
            server, client = CurveKeys.generate().admitting(folder / "admitted"), CurveKeys.generate()
            admit(folder / "admitted", "client", client.public)
            client = client.for_server(server.public)
        listen = "tcp://127.0.0.1:*" if self.encrypted else None
        self.started.append(Broker(folder, listen, server, limits))
        return ZmqBus(self.started[-1].address, "test", client, limits=limits)

    def close(self) -> None:
        for broker in self.started:
            broker.close()
            for path in sorted(broker.folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            broker.folder.rmdir()


@pytest.fixture(params=["memory", "ipc", "curve"])
def factory(request: pytest.FixtureRequest) -> Iterator[Factory]:
    if request.param == "memory":
        yield MemoryBus
        return
    brokers = Brokers(request.param == "curve")
    yield brokers
    brokers.close()


def test_contract(factory: Factory) -> None:
    check_bus(factory)
