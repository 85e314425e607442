"""A worker: a process that does one job at a time for the pool that it connects to.

`python -m esper.workers.worker --connect ADDRESS --module MODULE --folder FOLDER` joins a pool. One thread talks with
the pool and beats; the main thread does the jobs, each in a sandboxed child. The worker ends when the pool says so,
when the pool is silent for too long, when the process that started it dies, and on SIGTERM or SIGINT.
"""

import argparse
import contextlib
import math
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final, final

import zmq

from esper.leyline.errors import EsperError
from esper.leyline.ids import new_id
from esper.oona.keys import CurveKeys
from esper.workers import confine, wire
from esper.workers.contracts import Job, JobModule
from esper.workers.execute import Answer, execute, load_module

TOKEN: Final = "ESPER_WORKER_TOKEN"
"""Environment variable that carries the pool's token to the workers that it starts."""

_LOOK_MS: Final = 50
_NICE: Final = 10
_AGAIN_S: Final = 3.0
_LOST: Final = 3
"""Exit status of a worker whose pool was silent for too long."""


@final
class Worker:
    """Talks with a pool and does its jobs.

    Args:
        address: where the pool listens, e.g. `tcp://127.0.0.1:7001`.
        module: the module of jobs.
        folder: folder for the jobs' private folders.
        name: what the pool calls this worker.
        token: shows the pool that it started this worker; not needed with keys.
        keys: our key pair with the pool's public key; None on the same machine.
        parent: process whose death ends this worker; 0 for none.
        patience_s: how long the pool may be silent before the worker ends, in seconds, until the pool says otherwise.
    """

    def __init__(
        self,
        address: str,
        module: JobModule,
        folder: Path,
        *,
        name: str,
        token: str = "",
        keys: CurveKeys | None = None,
        parent: int = 0,
        patience_s: float = 30.0,
    ) -> None:
        """Remember what to do; `run` does it."""
        self._address, self._module, self._folder, self._name = address, module, folder, name
        self._token, self._keys, self._parent, self._patience_s = token, keys, parent, patience_s
        self._beat_s = 1.0
        self._todo: queue.Queue[Job] = queue.Queue()
        self._answers: queue.Queue[tuple[str, Answer]] = queue.Queue()
        self._doing = ""
        self._answer: tuple[str, Answer] | None = None
        self._said = 0.0
        self._stop = threading.Event()
        self._status = 0

    def run(self) -> int:
        """Work until told to stop; return the exit status."""
        talk = threading.Thread(target=self._talk, name="pool", daemon=True)
        talk.start()
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                job = self._todo.get(timeout=0.2)
                answer = execute(self._module, job, self._folder / job.id, self._stop)
                self._answers.put((job.id, answer))
        talk.join(timeout=5.0)
        return self._status

    def stop(self, status: int = 0) -> None:
        """Have everything end soon; safe in a signal handler."""
        self._status = status
        self._stop.set()

    # --- the thread that talks ----------------------------------------------------------------------------------

    def _talk(self) -> None:
        """Talk with the pool; a talker that fails ends the worker."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._converse(self._connect(context))
        except Exception as error:  # no silent half-dead worker, whatever it was
            print(f"worker {self._name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self.stop(1)
        finally:
            self._stop.set()
            context.destroy(linger=0)

    def _connect(self, context: "zmq.Context[zmq.Socket[bytes]]") -> "zmq.Socket[bytes]":
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.reconnect_ivl, dealer.reconnect_ivl_max = 100, 2000
        dealer.maxmsgsize = wire.MAX_FRAME
        if self._keys is not None:
            dealer.curve_publickey, dealer.curve_secretkey = self._keys.public.encode(), self._keys.secret.encode()
            dealer.curve_serverkey = self._keys.server.encode()
        dealer.connect(self._address)
        return dealer

    def _converse(self, dealer: "zmq.Socket[bytes]") -> None:
        self._say_hello(dealer)
        heard = beaten = time.monotonic()
        while not self._stop.is_set():
            while dealer.poll(_LOOK_MS):
                heard = time.monotonic()
                self._hear(dealer)
            now = time.monotonic()
            if self._take_answer() or now - beaten >= self._beat_s:
                beaten = now
                self._beat(dealer)
            if self._parent and os.getppid() != self._parent:
                self.stop(_LOST)
            if now - heard > self._patience_s:
                print(f"worker {self._name}: the pool is silent", file=sys.stderr, flush=True)
                self.stop(_LOST)

    def _hear(self, dealer: "zmq.Socket[bytes]") -> None:
        verb, fields = wire.unpack(dealer.recv_multipart())
        if verb == wire.WELCOME:
            self._beat_s, self._patience_s = float(fields["beat_s"]), float(fields["patience_s"])
        elif verb == wire.WHO:
            self._say_hello(dealer)
        elif verb == wire.HEARD and self._answer and fields["job"] == self._answer[0]:
            self._answer, self._doing = None, ""
        elif verb == wire.JOB and not self._doing:
            self._doing = fields["id"]
            self._todo.put(Job(**fields))
            self._send(dealer, wire.BEAT, job=self._doing)
        elif verb == wire.STOP:
            self.stop()

    def _take_answer(self) -> bool:
        """Whether the job in hand has just ended."""
        with contextlib.suppress(queue.Empty):
            self._answer = self._answers.get_nowait()
            self._said = -math.inf
            return True
        return False

    def _beat(self, dealer: "zmq.Socket[bytes]") -> None:
        """Show that we live; an answer that was not heard is said again."""
        self._send(dealer, wire.BEAT, job=self._doing)
        now = time.monotonic()
        if self._answer is None or now - self._said < _AGAIN_S:
            return
        self._said = now
        job, answer = self._answer
        if answer.unfit:
            self._send(dealer, wire.UNFIT, job=job, reason=answer.reason[:10_000])
        elif answer.result is not None:
            self._send(dealer, wire.DONE, job=job, result=answer.result, cpu=answer.cpu_seconds)
        else:
            fields = {"reason": answer.reason[:10_000], "final": answer.final, "cpu": answer.cpu_seconds}
            self._send(dealer, wire.FAILED, job=job, **fields)

    def _say_hello(self, dealer: "zmq.Socket[bytes]") -> None:
        self._send(dealer, wire.HELLO, name=self._name, token=self._token, job=self._doing)

    def _send(self, dealer: "zmq.Socket[bytes]", verb: bytes, **fields: Any) -> None:
        # With the queue full, the pool is away; the next beat says it again.
        with contextlib.suppress(zmq.Again):
            dealer.send_multipart(wire.pack(verb, **fields), zmq.DONTWAIT)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m esper.workers.worker", description="Join a pool of workers.")
    parser.add_argument("--connect", required=True, help="address of the pool, e.g. tcp://127.0.0.1:7001")
    parser.add_argument("--module", required=True, help="module of jobs, e.g. esper.tezzeret.job")
    parser.add_argument("--folder", type=Path, help="folder for the jobs; a temporary one by default")
    parser.add_argument("--name", default="", help="what the pool calls this worker")
    parser.add_argument("--key", type=Path, help="file of our key pair (CurveKeys.save)")
    parser.add_argument("--server-key", default="", help="public key of the pool")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds that the pool may be silent")
    parser.add_argument("--parent", type=int, default=0, help="process whose death ends this worker")
    return parser.parse_args(argv)


def _join(options: argparse.Namespace, folder: Path) -> int:
    keys = CurveKeys.load(options.key).for_server(options.server_key) if options.key else None
    name = options.name or f"{os.uname().nodename}-{new_id()[:8]}"
    token = os.environ.pop(TOKEN, "")
    module = load_module(options.module)
    worker = Worker(
        options.connect,
        module,
        folder,
        name=name,
        token=token,
        keys=keys,
        parent=options.parent,
        patience_s=options.patience,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    return worker.run()


def main(argv: list[str] | None = None) -> int:
    """Join a pool as the command line says; return the exit status."""
    options = _arguments(argv)
    if options.parent:
        with contextlib.suppress(confine.Refused):
            confine.die_with_parent(signal.SIGKILL, options.parent)
    confine.be_nice(_NICE)
    try:
        if options.folder is not None:
            return _join(options, options.folder)
        with tempfile.TemporaryDirectory(prefix="esper-worker-") as folder:
            return _join(options, Path(folder))
    except EsperError as error:
        print(f"worker: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
