"""The thread of a process pool: hears its workers, gives them jobs, and replaces the dead."""

import contextlib
import hmac
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import zmq

from esper.leyline.errors import ConfigError, ContractError, StoreError
from esper.leyline.events import SecurityAlert, Violation, WorkerDied
from esper.oona.gate import Gate
from esper.workers import wire
from esper.workers.contracts import Event, JobState, OnEvent
from esper.workers.crew import Crew, Death
from esper.workers.journal import JobJournal
from esper.workers.roster import Hand, Roster

_LOG: Final = logging.getLogger(__name__)
_LOOK_MS: Final = 50
_AT_ONCE: Final = 100
_TROUBLE_S: Final = 0.5
_DAY_S: Final = 86_400.0
_TIDY_S: Final = 600.0

Socket = zmq.Socket[bytes]


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How a pool treats its workers and jobs.

    Args:
        beat_s: how often a worker shows that it lives, in seconds.
        lease_s: a worker that is silent for so long has lost its job, in seconds; several beats.
        patience_s: a worker ends when its pool is silent for so long, in seconds.
        max_tries: a job is put in quarantine when this many tries have failed.
        cpu_budget_s: CPU time that the jobs may spend in a day (UTC), in seconds; None for no bound.
        keep_s: results that were taken are kept for so long, in seconds.
        cpus: processors that the pool's own workers may run on; empty for all.
    """

    beat_s: float = 1.0
    lease_s: float = 15.0
    patience_s: float = 30.0
    max_tries: int = 3
    cpu_budget_s: float | None = None
    keep_s: float = 7 * _DAY_S
    cpus: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Check that the times fit each other.

        Raises:
            ConfigError: a value is out of range.
        """
        if not 0 < self.beat_s <= self.lease_s / 2:
            raise ConfigError(f"beat_s is {self.beat_s} and lease_s {self.lease_s}; a lease lasts two beats or more.")
        if self.patience_s <= self.beat_s:
            raise ConfigError(f"patience_s is {self.patience_s}; it must be above beat_s, {self.beat_s}.")
        if self.max_tries < 1:
            raise ConfigError(f"max_tries is {self.max_tries}; a job is tried once or more.")


@final
class Foreman:
    """Runs a pool, in one thread that owns sockets, crew and roster.

    Args:
        name: name of the pool.
        journal: its jobs.
        config: times and limits.
        sockets: the router of its own workers, and that of others if there is one.
        gate: answers who may connect to the second; None without it.
        crew: its own workers.
        token: what they show.
        tell: called when a job has ended.
        on_event: told of deaths and of peers that were turned away.
    """

    def __init__(
        self,
        name: str,
        journal: JobJournal,
        config: PoolConfig,
        sockets: Sequence[Socket],
        gate: Gate | None,
        crew: Crew,
        token: str,
        tell: Callable[[], None],
        on_event: OnEvent | None,
    ) -> None:
        """Prepare; `run` works until `stop` is set."""
        self._name, self._journal, self._config, self._sockets = name, journal, config, tuple(sockets)
        self._gate, self._crew, self._token, self._tell, self._on_event = gate, crew, token, tell, on_event
        self.roster = Roster()
        self.deaths = 0
        self.stop = threading.Event()
        self._tidied = 0.0

    def run(self) -> None:
        """Work until told to stop, then end every worker."""
        poller = zmq.Poller()
        for socket in (*self._sockets, *([self._gate.socket] if self._gate else [])):
            poller.register(socket, zmq.POLLIN)
        try:
            while not self.stop.is_set():
                self._step(dict(poller.poll(_LOOK_MS)))
        finally:
            for hand in self.roster:
                self._send(hand, wire.STOP)
            self._crew.end()

    def _step(self, ready: dict[Any, int]) -> None:
        """Do what there is to do; a journal that cannot be written is tried again, for a full disk may be emptied."""
        try:
            for socket in self._sockets:
                if socket in ready:
                    self._receive(socket)
            if self._gate is not None and self._gate.socket in ready and (key := self._gate.answer()):
                self._alert(key, "its key is not admitted, so it was not connected")
            self._look_after()
            self._dispatch()
        except StoreError as error:
            _LOG.warning("Pool %s waits: %s", self._name, error)
            self.stop.wait(_TROUBLE_S)

    # --- hearing ------------------------------------------------------------------------------------------------

    def _receive(self, socket: Socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                identity, *frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                self._hear(socket, identity, *wire.unpack(frames))
            except ContractError as error:
                self._alert(identity.hex(), f"its message was dropped: {error}")

    def _hear(self, socket: Socket, identity: bytes, verb: bytes, fields: dict[str, Any]) -> None:
        if verb == wire.HELLO:
            self._greet(socket, identity, fields)
            return
        hand = self.roster.find(socket, identity)
        if hand is None:
            self._send(Hand("", socket, identity, remote=True), wire.WHO)
            return
        hand.heard = time.monotonic()
        if verb == wire.BEAT:
            self._beat(hand, fields["job"])
        elif verb in (wire.DONE, wire.FAILED):
            self._answered(hand, verb, fields)
        elif verb == wire.UNFIT:
            self._hand_back(hand, fields["job"], fields["reason"])

    def _greet(self, socket: Socket, identity: bytes, fields: dict[str, Any]) -> None:
        """Let a worker in that shows the token, or whose key the gate has let in."""
        own = socket is self._sockets[0]
        if own and not hmac.compare_digest(fields["token"].encode(), self._token.encode()):
            self._alert(fields["name"][:80], "it did not show the pool's token, so it gets no job")
            return
        # An admitted peer cannot take the name of one of ours.
        name = fields["name"] if own else f"remote/{fields['name']}"
        hand = Hand(name, socket, identity, remote=not own, job=fields["job"])
        self.roster.join(hand)
        self._send(hand, wire.WELCOME, beat_s=self._config.beat_s, patience_s=self._config.patience_s)

    def _beat(self, hand: Hand, job: str) -> None:
        if job:
            hand.job = job
            self._journal.renew(job, hand.name, self._config.lease_s)
        self._send(hand, wire.HEARD, job="")

    def _answered(self, hand: Hand, verb: bytes, fields: dict[str, Any]) -> None:
        """Keep an answer. It is acknowledged whether or not it was needed, or the worker would never be free."""
        job, cpu = fields["job"], float(fields["cpu"])
        if verb == wire.DONE:
            news = self._journal.done(job, fields["result"], cpu_seconds=cpu, worker=hand.name)
        else:
            reason, final = fields["reason"], fields["final"]
            news = bool(self._journal.failed(job, reason, final=final, worker=hand.name, cpu_seconds=cpu))
        if news:
            self._journal.spend(cpu)
            self._tell()
        hand.job = ""
        self._send(hand, wire.HEARD, job=job)

    def _hand_back(self, hand: Hand, job: str, reason: str) -> None:
        """Let a job that this worker cannot do wait for another one; it is not the job's fault, and no try of it."""
        if self._journal.requeue(hand.name):
            hand.unfit.add(job)
            self._alert(hand.name, f"it handed job {job} back: {reason}", Violation.FINGERPRINT)
        hand.job = ""
        self._send(hand, wire.HEARD, job=job)

    # --- looking after ------------------------------------------------------------------------------------------

    def _look_after(self) -> None:
        for death in self._crew.tend():
            self._bury(death)
        for hand in self.roster.silent(self._config.lease_s):
            # One of ours is killed and buried at the next look; the others are let go.
            if not self._crew.kill(hand.name):
                self._lose(hand.name, None, f"it was silent for {self._config.lease_s:g} s")
        for name in set(self._crew.older(2 * self._config.patience_s)) - {hand.name for hand in self.roster}:
            self._crew.kill(name)  # It hangs, and has never said a word.
        for job, worker in self._journal.expired():
            self._journal.failed(job, f"the lease of worker {worker} ran out", final=False, worker=worker)
            self.roster.release(worker, job)
            self._tell()
        if time.monotonic() - self._tidied > _TIDY_S:
            self._tidied = time.monotonic()
            self._journal.prune(self._config.keep_s)

    def _bury(self, death: Death) -> None:
        self._lose(death.name, death.exit_code, death.tail)

    def _lose(self, name: str, exit_code: int | None, detail: str) -> None:
        """Strike a worker off, take its job back and tell."""
        hand = self.roster.leave(name)
        self.deaths += 1
        job, state = hand.job if hand else "", None
        if job:
            reason = f"worker {name} died, {_status(exit_code)}"
            state = self._journal.failed(job, reason, final=False, worker=name)
            self._tell()
        attempt = hand.attempt if hand else 0
        again = state is JobState.WAITING
        self._event(
            WorkerDied(
                pool=self._name,
                worker_id=name,
                job_id=job,
                attempt=attempt,
                exit_code=exit_code,
                requeued=again,
                detail=detail,
            )
        )

    # --- giving jobs --------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        budget = self._config.cpu_budget_s
        for hand in self.roster:
            if hand.job:
                continue
            if budget is not None and self._journal.spent_today() >= budget:
                return
            job = self._journal.lease(hand.name, self._config.lease_s, hand.unfit)
            if job is None:
                continue
            hand.job, hand.attempt = job.id, job.attempt
            self._send(hand, wire.JOB, id=job.id, key=job.key, kind=job.kind, payload=job.payload, attempt=job.attempt)

    def _send(self, hand: Hand, verb: bytes, **fields: Any) -> None:
        # A worker that does not take its letters is silent too, and is dealt with as such.
        with contextlib.suppress(zmq.ZMQError):
            hand.socket.send_multipart([hand.identity, *wire.pack(verb, **fields)], zmq.DONTWAIT)

    # --- telling ------------------------------------------------------------------------------------------------

    def _alert(self, subject: str, detail: str, violation: Violation = Violation.PERMISSION) -> None:
        self._event(SecurityAlert(source=f"pool {self._name}", subject=subject, violation=violation, detail=detail))

    def _event(self, event: Event) -> None:
        if self._on_event is None:
            _LOG.info("%s", event)
            return
        try:
            self._on_event(event)
        except Exception:  # the owner's mistake must not end the pool
            _LOG.exception("The owner of pool %s could not take an event.", self._name)


def _status(exit_code: int | None) -> str:
    if exit_code is None:
        return "or its machine is unreachable"
    return f"killed by signal {-exit_code}" if exit_code < 0 else f"with exit status {exit_code}"
