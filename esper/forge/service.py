"""The forge at work: bus, store, Karn, Tezzeret and Urabrask in one process, which alone holds the private keys."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self, final

from esper.blueprints import load_library
from esper.forge.curve import curve_keys
from esper.forge.field import ReportKeeper
from esper.forge.link import Places
from esper.karn.service import Karn
from esper.leyline.base import Message
from esper.leyline.envelope import Priority, event_topic
from esper.leyline.errors import EsperError
from esper.leyline.events import SecurityAlert
from esper.oona.broker import Broker
from esper.oona.client import ZmqBus
from esper.tezzeret.job import SHELF
from esper.tezzeret.service import Tezzeret
from esper.urabrask.service import Urabrask
from esper.urza.signing import KeyRing
from esper.urza.store import Urza
from esper.workers.contracts import Event, JobState
from esper.workers.foreman import PoolConfig
from esper.workers.limits import KEYS
from esper.workers.pool import ProcessPool

_WAIT_S = 0.075
_LONGEST_SOCKET = 90
_log = logging.getLogger(__name__)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables that the workers inherit, and leave the process as it was."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@final
class Workshop:
    """Everything that a forge runs; `step` does one round, `close` ends it all.

    Args:
        places: where its things are; one forge at a time works there.
        tezzeret: workers that compile.
        urabrask: workers that try kernels out.
        cpu_budget_s: processor time that compiling may take in a day, in seconds; None for no bound.
        listen: host that workers of other machines may join at, e.g. `0.0.0.0`; None admits none.

    Raises:
        EsperError: a folder, a key or an address is not to be had.
    """

    def __init__(
        self,
        places: Places,
        *,
        tezzeret: int = 1,
        urabrask: int = 1,
        cpu_budget_s: float | None = None,
        listen: str | None = None,
    ) -> None:
        """Start broker, store and pools."""
        places.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.places, self._stack = places, ExitStack()
        try:
            shelf = os.environ.get(SHELF, str(places.shelf))
            self._stack.enter_context(_environment({SHELF: shelf, KEYS: str(places.keys)}))
            self.broker = self._stack.enter_context(Broker(places.bus, self._address()))
            self.bus = self._stack.enter_context(ZmqBus(self.broker.address, sender="forge"))
            self.urza = self._stack.enter_context(Urza(places.store, KeyRing(places.keys), on_alert=self._alert))
            budget = PoolConfig(cpu_budget_s=cpu_budget_s)
            self.pools = {
                "tezzeret": self._pool("tezzeret", tezzeret, listen, budget),
                "urabrask": self._pool("urabrask", urabrask, listen, PoolConfig()),
            }
            self._open_services()
        except BaseException:
            self._stack.close()
            raise

    def _address(self) -> str | None:
        """Return where the bus listens; None is a socket in its own folder, whose path must not be long."""
        if len(os.fsencode(places_bus := self.places.bus / "bus")) <= _LONGEST_SOCKET:
            return None
        private = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="esper-bus-"))
        return f"ipc://{private}/{places_bus.name}"

    def _open_services(self) -> None:
        karn = Karn(self.bus, self.urza, load_library())
        tezzeret = Tezzeret(self.bus, self.urza, self.pools["tezzeret"])
        urabrask = Urabrask(self.bus, self.urza, self.pools["urabrask"])
        keeper = ReportKeeper(self.bus, self.urza)
        for service in (karn, tezzeret, urabrask, keeper):
            self._stack.callback(service.close)
        self._steps: dict[str, Callable[[float], bool]] = {
            "karn": karn.step,
            "tezzeret": tezzeret.step,
            "urabrask": urabrask.step,
            "field reports": keeper.step,
        }
        karn.open()

    def _pool(self, name: str, workers: int, listen: str | None, config: PoolConfig) -> ProcessPool:
        keys = curve_keys(self.places).admitting(self.places.keys / "admitted") if listen else None
        pool = ProcessPool(
            name,
            f"esper.{name}.job",
            workers,
            folder=self.places.jobs / name,
            listen=f"tcp://{listen}:*" if listen and ":" not in listen else (f"tcp://{listen}" if listen else None),
            keys=keys,
            config=config,
            on_event=self._tell,
        )
        return self._stack.enter_context(pool)

    def step(self) -> bool:
        """Let each service do one round; one that fails is logged and has its turn again.

        Returns:
            Whether there was anything to do.
        """
        worked = False
        self._make_room()
        for name, step in self._steps.items():
            try:
                worked |= step(0.0 if worked else _WAIT_S)
            except EsperError as error:
                _log.error("%s: %s", name, error)
        return worked

    def _make_room(self) -> None:
        """Let Urabrask check the library only while Tezzeret has nothing to do: they may share one core."""
        jobs = self.pools["tezzeret"].stats().jobs
        busy = jobs.get(JobState.WAITING, 0) + jobs.get(JobState.LEASED, 0) > 0
        self.pools["urabrask"].hold(Priority.NORMAL if busy else Priority.LOW)

    def close(self) -> None:
        """End the pools, the bus and the store; what is under way waits in the journals."""
        self._stack.close()

    def _tell(self, event: Event) -> None:
        if isinstance(event, SecurityAlert):
            _log.warning("%s, %s: %s", event.source, event.subject, event.detail)
        self._publish(event)

    def _alert(self, alert: SecurityAlert) -> None:
        self._publish(alert, Priority.EMERGENCY)

    def _publish(self, event: Message, priority: Priority = Priority.HIGH) -> None:
        try:
            self.bus.publish(event, event_topic(type(event).__name__), priority=priority)
        except EsperError as error:
            _log.warning("%s could not be told: %s", type(event).__name__, error)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
