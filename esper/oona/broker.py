"""The broker: the bus between processes; `python -m esper.oona.broker --folder FOLDER` runs one by itself."""

import argparse
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, final

import zmq

from esper.leyline.codec import decode
from esper.leyline.envelope import Envelope, Priority
from esper.leyline.errors import BusError, ConfigError, ContractError, EsperError
from esper.oona import wire
from esper.oona.contracts import BusLimits, is_journalled
from esper.oona.exchange import ConsumerFull, Exchange, Sealed, open_letter
from esper.oona.gate import Gate, check_address
from esper.oona.journal import Journal
from esper.oona.keys import CurveKeys

_BATCH = 200
_TICK_S = 0.25
_HEARTBEAT_MS = 2_000
_PROBE_S = 1.0
_IPC = "ipc://"
_log = logging.getLogger(__name__)


@dataclass
class _Peer:
    """Where a subscriber is, and how many letters it has room for."""

    route: bytes
    room: int = 0


@final
class Broker:
    """Keeps the journal and routes letters between processes, in a thread of its own.

    Args:
        folder: where the journal is; made if it does not exist, for its owner only.
        listen: address, `ipc://...` or `tcp://host:port` (port `*`: any free one). Default: a socket in `folder`.
        keys: the broker's pair with the folder of admitted keys; needed as soon as other machines can reach it.
        limits: bounds of the bus.

    Raises:
        ConfigError: other machines could reach the address and there are no keys.
        BusError: the address is taken or malformed, or another broker has the folder.

    Example:
        >>> import tempfile
        >>> from esper.oona.client import ZmqBus
        >>> with tempfile.TemporaryDirectory() as folder, Broker(folder, "tcp://127.0.0.1:*") as broker:
        ...     with ZmqBus(broker.address, sender="me") as bus, bus.subscribe("a") as subscription:
        ...         subscription.receive(timeout_s=0.01) is None
        True
    """

    def __init__(
        self,
        folder: str | Path,
        listen: str | None = None,
        keys: CurveKeys | None = None,
        limits: BusLimits | None = None,
    ) -> None:
        """Open the journal, bind the address and start the thread."""
        folder = Path(folder)
        listen = listen if listen is not None else f"ipc://{folder.resolve() / 'bus'}"
        check_address(listen, keys)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = folder
        self._exchange = Exchange(Journal(folder / "journal.sqlite"), limits if limits is not None else BusLimits())
        self._peers: dict[str, _Peer] = {}
        self._next_probe = 0.0
        self._wake = wire.Wake()
        self._stopping = False
        self.address = ""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        try:
            self._gate = None if keys is None else Gate(self._context, self._router, keys)
            self.address = self._bind(listen)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._run, name="oona-broker", daemon=True)
        self._thread.start()

    def _bind(self, listen: str) -> str:
        router = self._router
        router.linger = 0
        router.router_mandatory = True
        router.maxmsgsize = wire.MAX_FRAME_BYTES
        router.heartbeat_ivl = _HEARTBEAT_MS
        try:
            router.bind(listen)
        except zmq.ZMQError as error:
            hint = "stop whoever uses it, or give another, e.g. 'tcp://127.0.0.1:*'"
            raise BusError(f"The bus cannot listen on {listen}: {error}; {hint}.") from error
        return router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._router, self._wake.handle, *([self._gate.socket] if self._gate else [])):
            poller.register(source, zmq.POLLIN)
        wait_s = 0.0
        while not self._stopping:
            ready = dict(poller.poll(math.ceil(max(0.0, min(wait_s, _TICK_S)) * 1_000)))
            try:
                if self._gate is not None and self._gate.socket in ready:
                    self._refuse_key(self._gate.answer())
                if self._router in ready:
                    self._read()
                wait_s = self._exchange.tick()
                self._probe()
                self._dispatch()
            except Exception:
                _log.exception("The bus goes on after an error.")
                wait_s = _TICK_S
        self._release()

    def _release(self) -> None:
        self._context.destroy(linger=0)
        if self.address.startswith(_IPC):
            Path(self.address.removeprefix(_IPC)).unlink(missing_ok=True)
        self._exchange.close()
        self._wake.close()

    def _refuse_key(self, key: str | None) -> None:
        if key is not None:
            self._exchange.alert("oona.gate", key, f"A peer with the unknown key {key!r} tried to connect; refused.")

    def _read(self) -> None:
        """Handle what has arrived: the letters of one turn are written to the journal together."""
        letters: list[tuple[bytes, bytes, Sealed]] = []
        for _ in range(_BATCH):
            try:
                route, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._guard(route, frames, letters)
        if letters:
            results = self._exchange.accept([letter for _, _, letter in letters])
            for (route, number, _), result in zip(letters, results, strict=True):
                self._answer(route, number, result)

    def _guard(self, route: bytes, frames: list[bytes], letters: list[tuple[bytes, bytes, Sealed]]) -> None:
        """Handle one request; whatever is wrong with it is its sender's problem alone."""
        number = frames[2][:64] if len(frames) > 2 else b""
        try:
            if len(frames) != 4 or frames[0] != wire.VERSION:
                raise ContractError(f"{len(frames)} frames are no request of {wire.VERSION.decode()}; update the peer.")
            _, verb, number, body = frames
            if (letter := self._handle(route, verb, number, body)) is not None:
                letters.append((route, number, letter))
        except ContractError as error:
            self._exchange.alert("oona.broker", f"peer {route.hex()}", f"A request was refused: {error}")
            self._answer(route, number, error)
        except EsperError as error:
            self._answer(route, number, error)
        except Exception as error:
            _log.exception("A request could not be handled.")
            self._answer(route, number, BusError(f"The broker could not handle the request: {error!r}."))

    def _handle(self, route: bytes, verb: bytes, number: bytes, body: bytes) -> Sealed | None:
        """Do what a request asks; return the letter if it is one that must be kept."""
        if verb == wire.PUBLISH:
            envelope, _ = open_letter(body)
            if is_journalled(envelope.topic):
                return Sealed(envelope, body)
            raise ContractError(f"Letters on {envelope.topic} are not kept; send them as telemetry.")
        if verb == wire.TELEMETRY:
            self._offer(body)
            return None
        actions: dict[bytes, Callable[[bytes, bytes], int | None]] = {
            wire.SUBSCRIBE: self._subscribe,
            wire.PULL: self._pull,
            wire.ACK: self._ack,
            wire.LEAVE: self._leave,
            wire.FORGET: self._forget,
        }
        if verb not in actions:
            raise ContractError(f"{verb[:20]!r} is not a request; see esper.oona.wire for those that are.")
        offset = actions[verb](route, body)
        if offset is not None:
            self._answer(route, number, offset)
        return None

    def _offer(self, body: bytes) -> None:
        envelope = decode(Envelope, body)
        if is_journalled(envelope.topic):
            raise ContractError(f"Letters on {envelope.topic} must be kept; publish them.")
        self._exchange.offer(Sealed(envelope, body))

    # --- requests ---------------------------------------------------------------------------------------------------

    def _subscribe(self, route: bytes, body: bytes) -> int:
        kinds = {"name": str, "topics": list, "group": str, "since": int | None, "resume": int}
        asked = wire.unpack(body, **kinds)
        name, topics = asked["name"], [str(topic) for topic in asked["topics"]]
        end = self._exchange.join(name, topics, asked["group"], asked["since"], heard=0.0, resume=asked["resume"])
        self._exchange.hear(name, ())
        self._peers[name] = _Peer(route)
        return end

    def _pull(self, route: bytes, body: bytes) -> None:
        asked = wire.unpack(body, name=str, room=int, held=list)
        name = asked["name"]
        if not self._exchange.knows(name):
            self._peers.pop(name, None)
            self._send([route, wire.VERSION, wire.UNKNOWN, name.encode(), b"subscribe again"])
            return
        self._exchange.hear(name, [offset for offset in asked["held"] if isinstance(offset, int)])
        self._peers[name] = _Peer(route, min(asked["room"], wire.WINDOW))

    def _ack(self, route: bytes, body: bytes) -> int:
        asked = wire.unpack(body, name=str, offsets=list)
        self._exchange.ack(asked["name"], [offset for offset in asked["offsets"] if isinstance(offset, int)])
        return 0

    def _leave(self, route: bytes, body: bytes) -> int:
        name = wire.unpack(body, name=str)["name"]
        self._peers.pop(name, None)
        self._exchange.leave(name)
        return 0

    def _forget(self, route: bytes, body: bytes) -> int:
        self._exchange.forget(wire.unpack(body, group=str)["group"])
        return 0

    # --- sending ----------------------------------------------------------------------------------------------------

    def _answer(self, route: bytes, number: bytes, result: int | EsperError) -> None:
        if isinstance(result, int):
            verb, body = wire.DONE, wire.pack(offset=result)
        elif isinstance(result, ConsumerFull):
            verb, body = wire.BUSY, str(result).encode()
        else:
            verb, body = wire.REFUSED, wire.pack_error(result)
        if number:
            self._send([route, wire.VERSION, verb, number, body])

    def _send(self, frames: list[bytes]) -> bool:
        """Send without waiting; a peer that is gone or stuck asks again when it can."""
        try:
            self._router.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _probe(self) -> None:
        """Find out, once a second, whose process is gone, and make ready again what it held."""
        now = time.monotonic()
        if now < self._next_probe:
            return
        self._next_probe = now + _PROBE_S
        for name, peer in list(self._peers.items()):
            try:
                self._router.send_multipart([peer.route, wire.VERSION, wire.PROBE, name.encode(), b""], zmq.NOBLOCK)
            except zmq.Again:
                continue
            except zmq.ZMQError:
                del self._peers[name]
                if self._exchange.knows(name):
                    self._exchange.release(name)

    def _dispatch(self) -> None:
        """Hand out letters, one to each subscriber in turn, as long as somebody has room."""
        for name in [name for name in self._peers if not self._exchange.knows(name)]:
            del self._peers[name]
        hungry = list(self._peers)
        while hungry:
            hungry = [name for name in hungry if self._deliver(name, self._peers[name])]

    def _deliver(self, name: str, peer: _Peer) -> bool:
        """Send one letter, if there is room; an emergency does not wait for that. Return whether one was sent."""
        least = 1 - wire.WINDOW if self._exchange.urgency(name) == Priority.EMERGENCY else 1
        taken = self._exchange.take(name) if peer.room >= least else None
        if taken is None:
            return False
        head = wire.pack(offset=taken.offset, priority=taken.priority)
        if not self._send([peer.route, wire.VERSION, wire.LETTER, name.encode(), head, taken.data]):
            peer.room = -wire.WINDOW
            self._exchange.release(name)
            return False
        peer.room = min(peer.room, 1 if len(taken.data) > wire.LARGE_BYTES else wire.WINDOW) - 1
        return True

    def close(self) -> None:
        """Stop the thread and close the journal; a second call changes nothing."""
        if not self._stopping:
            self._stopping = True
            self._wake.set()
        self._thread.join()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def main(arguments: list[str] | None = None) -> int:
    """Run a broker until it is told to stop; print its address when it listens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the journal is")
    parser.add_argument("--listen", help="address, e.g. tcp://127.0.0.1:7000 (default: a socket in the folder)")
    parser.add_argument("--keys", type=Path, help="the broker's key file")
    parser.add_argument("--admitted", type=Path, help="folder of the public keys that may connect")
    options = parser.parse_args(arguments)
    try:
        keys = None if options.keys is None else CurveKeys.load(options.keys)
        if keys is not None and options.admitted is not None:
            keys = keys.admitting(options.admitted)
        broker = Broker(options.folder, options.listen, keys)
    except (EsperError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    print(broker.address, flush=True)
    with broker:
        while not stop.wait(1.0):
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
