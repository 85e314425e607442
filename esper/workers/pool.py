"""A pool of worker processes: those it starts itself, and those that join from other machines."""

import atexit
import contextlib
import os
import secrets
import threading
from pathlib import Path
from typing import Final, final

import zmq

from esper.leyline.envelope import Priority
from esper.leyline.errors import BusError, ConfigError, StoreError
from esper.oona.gate import Gate, check_address
from esper.oona.keys import CurveKeys
from esper.workers import wire
from esper.workers.contracts import JobResult, OnEvent, Pool, PoolStats
from esper.workers.crew import Crew
from esper.workers.desk import Desk
from esper.workers.foreman import Foreman, PoolConfig, Socket
from esper.workers.journal import JobJournal

_JOIN_S: Final = 15.0


@final
class ProcessPool(Pool):
    """Workers in processes of their own, at low priority, started again when they die.

    The pool's own workers connect over the loopback and show a token that only they were given. Others join at
    `listen` with CURVE keys. A worker that dies or falls silent loses its job, which is tried again.

    Args:
        name: what the pool is called in events.
        job_module: name of the module of jobs, e.g. `esper.tezzeret.job`.
        workers: number of workers to start; 0 leaves the work to those that join.
        folder: folder for the journal and the workers' files; one pool at a time.
        listen: address for workers of other machines, e.g. `tcp://*:7001`; None admits none.
        keys: our key pair with its folder of admitted keys (`CurveKeys.admitting`); needed to listen.
        config: times and limits.
        on_event: told of workers that died and of peers that were turned away; called from the pool's thread.

    Raises:
        ConfigError: a setting is out of range.
        StoreError: the journal cannot be opened.
        BusError: an address cannot be bound.
    """

    def __init__(
        self,
        name: str,
        job_module: str,
        workers: int = 1,
        *,
        folder: str | Path,
        listen: str | None = None,
        keys: CurveKeys | None = None,
        config: PoolConfig | None = None,
        on_event: OnEvent | None = None,
    ) -> None:
        """Start the pool and its workers."""
        if listen is not None:
            _check_open(listen, keys)
        self._name, self._module, self._config = name, job_module, config or PoolConfig()
        self._folder = Path(folder).resolve()
        self._journal = JobJournal(self._folder / "jobs.sqlite", max_tries=self._config.max_tries)
        self._journal.requeue()
        self._desk = Desk(self._journal)
        self._context: zmq.Context[Socket] = zmq.Context()
        sockets, gate = self._open_sockets(listen, keys)
        self._own, self._open = sockets[0], sockets[1] if listen is not None else None
        token = secrets.token_hex(16)
        crew = Crew(name, workers, self._folder / "workers", self._command, token, self._config.cpus)
        self._foreman = Foreman(
            name, self._journal, self._config, sockets, gate, crew, token, self._desk.tell, on_event
        )
        # The kernel counts the thread that starts a process as its parent: it must live as long as the workers.
        self._thread = threading.Thread(target=self._foreman.run, name=f"pool-{name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # --- the contract -------------------------------------------------------------------------------------------

    def submit(self, key: str, kind: str, payload: bytes, *, priority: int = Priority.NORMAL) -> str:
        """Take a job; see `Pool.submit`."""
        return self._desk.submit(key, kind, payload, priority)

    def hold(self, least: Priority = Priority.LOW) -> None:
        """Hand out jobs of this priority and more urgent ones only, until told otherwise."""
        self._journal.hold(least)

    def poll(self, timeout_s: float) -> list[JobResult]:
        """Return the jobs that have ended; see `Pool.poll`."""
        return self._desk.poll(timeout_s)

    def stats(self) -> PoolStats:
        """Return what the pool holds and does at this instant."""
        return PoolStats(
            name=self._name,
            jobs=self._journal.counts(),
            workers=tuple(hand.status() for hand in self._foreman.roster),
            deaths=self._foreman.deaths,
            cpu_seconds_today=self._journal.spent_today(),
            cpu_budget_s=self._config.cpu_budget_s,
        )

    def close(self) -> None:
        """End every worker and the pool's thread; what has not ended waits in the journal."""
        if self._foreman.stop.is_set():
            return
        self._foreman.stop.set()
        atexit.unregister(self.close)
        self._desk.close()
        self._thread.join(_JOIN_S)
        self._context.destroy(linger=0)
        with contextlib.suppress(StoreError):
            self._journal.requeue()
        self._journal.close()

    @property
    def address(self) -> str:
        """Where workers of other machines join, with the port that was chosen; empty for nowhere."""
        return _endpoint(self._open) if self._open is not None else ""

    # --- sockets ------------------------------------------------------------------------------------------------

    def _open_sockets(self, listen: str | None, keys: CurveKeys | None) -> tuple[list[Socket], Gate | None]:
        """Return the router of our own workers, that of the others, and the latter's gate."""
        sockets, gate, address = [self._router()], None, "tcp://127.0.0.1:*"
        try:
            sockets[0].bind(address)
            if listen is not None and keys is not None:
                address = listen
                sockets.append(self._router())
                gate = Gate(self._context, sockets[1], keys)
                sockets[1].bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            self._journal.close()
            raise BusError(f"The pool {self._name} cannot listen at {address}: {error}.") from error
        return sockets, gate

    def _router(self) -> Socket:
        router = self._context.socket(zmq.ROUTER)
        router.linger = 0
        router.maxmsgsize = wire.MAX_FRAME
        return router

    def _command(self, name: str, home: Path) -> list[str]:
        parts = ["--connect", _endpoint(self._own), "--module", self._module, "--folder", str(home), "--name", name]
        patience = ["--patience", str(self._config.patience_s), "--parent", str(os.getpid())]
        return ["-P", "-m", "esper.workers.worker", *parts, *patience]


def _endpoint(socket: Socket) -> str:
    address = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(address, bytes)
    return address.decode().rstrip("\0")


def _check_open(listen: str, keys: CurveKeys | None) -> None:
    if keys is None:
        raise ConfigError(f"The pool is to listen at {listen} without keys; make some with CurveKeys.generate().")
    check_address(listen, keys)
