"""A client's connection to the broker: one thread that owns the socket and asks until it is answered."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import final

import zmq
from zmq.utils.monitor import recv_monitor_message

from esper.leyline.errors import BusError, EsperError, UnknownPeer
from esper.leyline.ids import new_id
from esper.oona import wire
from esper.oona.keys import CurveKeys

_BEAT_S = 1.0
_RESEND_S = 1.0
_BACK_OFF_S = (0.005, 0.2)
_RECONNECT_MS = (50, 1_000)
_HEARTBEAT_MS = 2_000
_MAX_NOTES = 1_000
_CONNECTED = zmq.Event.HANDSHAKE_SUCCEEDED
_DENIED = zmq.Event.HANDSHAKE_FAILED_AUTH
_LOST = zmq.Event.DISCONNECTED
_PATIENCE_BEATS = 5
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Request:
    """A question that is sent again until it is answered; `then` runs in the link's thread."""

    verb: bytes
    body: bytes
    then: Callable[[int | EsperError], None] | None = None
    number: bytes = field(default_factory=lambda: new_id().encode())
    due: float = 0.0
    reply: tuple[bytes, bytes] | None = None
    answered: threading.Event = field(default_factory=threading.Event)


@final
class Link:
    """Asks the broker and hears what it says.

    Args:
        address: where the broker listens.
        keys: our pair with the broker's public key; `None` for a broker without keys.
        hear: called with every letter: subscription, head and data; in the link's thread.
        lost: called with the name of a subscription that the broker does not know; in the link's thread.
        beat: called once a second, and with True after every connect; in the link's thread.
        telemetry_capacity: telemetry that may wait to be sent before the oldest is dropped.

    Raises:
        BusError: the address is malformed.
    """

    def __init__(
        self,
        address: str,
        keys: CurveKeys | None,
        *,
        hear: Callable[[str, bytes, bytes], None],
        lost: Callable[[str], None],
        beat: Callable[[bool], None],
        telemetry_capacity: int,
    ) -> None:
        """Connect in the background and start the thread."""
        self.address = address
        self.dropped = 0
        self._hear, self._lost, self._beat = hear, lost, beat
        self._lock = threading.Lock()
        self._requests: dict[bytes, _Request] = {}
        self._notes: deque[list[bytes]] = deque(maxlen=_MAX_NOTES)
        self._telemetry: deque[bytes] = deque(maxlen=telemetry_capacity)
        self._denied = self._stopping = self._up = False
        self._blocked = False
        self._beats_down = 0
        self._wake = wire.Wake()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._connect(keys)
        except BaseException:
            self._context.destroy(linger=0)
            self._wake.close()
            raise
        self._thread = threading.Thread(target=self._run, name="oona-link", daemon=True)
        self._thread.start()

    def _connect(self, keys: CurveKeys | None) -> None:
        dealer = self._dealer = self._context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.immediate = True
        dealer.reconnect_ivl, dealer.reconnect_ivl_max = _RECONNECT_MS
        dealer.heartbeat_ivl = _HEARTBEAT_MS
        dealer.maxmsgsize = wire.MAX_FRAME_BYTES
        if keys is not None:
            dealer.curve_publickey, dealer.curve_secretkey = keys.public.encode(), keys.secret.encode()
            dealer.curve_serverkey = keys.server.encode()
        self._monitor = dealer.get_monitor_socket(_CONNECTED | _DENIED | _LOST)
        try:
            dealer.connect(self.address)
        except zmq.ZMQError as error:
            hint = "write 'ipc:///path/of/socket' or 'tcp://host:port'"
            raise BusError(f"{self.address!r} is not an address of a bus: {error}; {hint}.") from error

    # --- for any thread ---------------------------------------------------------------------------------------------

    def ask(self, verb: bytes, body: bytes, timeout_s: float) -> int:
        """Send a request and wait for its answer; while a consumer is full, ask again.

        Raises:
            BusError: no answer came in time, or the broker could not do it; also its other errors.
            UnknownPeer: the broker does not admit our key.
        """
        deadline = time.monotonic() + timeout_s
        pause, longest = _BACK_OFF_S
        obstacle = f"The bus at {self.address} gave no answer in {timeout_s:g} s; is its broker running?"
        while (remaining := deadline - time.monotonic()) > 0:
            result = self._ask_once(verb, body, deadline)
            if isinstance(result, int):
                return result
            obstacle = result or obstacle
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, longest)
        raise BusError(obstacle)

    def _ask_once(self, verb: bytes, body: bytes, deadline: float) -> int | str:
        """Return the answer, or as text what stands in its way; no text if nobody answered."""
        request = _Request(verb, body)
        self._send(request)
        request.answered.wait(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._requests.pop(request.number, None)
        if request.reply is None:
            self.check()
            return ""
        reply, answer = request.reply
        if reply == wire.BUSY:
            return answer.decode(errors="replace")
        result = _result(reply, answer)
        if isinstance(result, EsperError):
            raise result
        return result

    def post(self, verb: bytes, body: bytes, then: Callable[[int | EsperError], None]) -> None:
        """Send a request without waiting; `then` gets the answer in the link's thread."""
        self._send(_Request(verb, body, then))

    def _send(self, request: _Request) -> None:
        with self._lock:
            self._check()
            self._requests[request.number] = request
        self._wake.set()

    def tell(self, verb: bytes, body: bytes) -> None:
        """Send something that nobody answers; it may get lost."""
        with self._lock:
            self._notes.append([wire.VERSION, verb, b"", body])
        self._wake.set()

    def offer(self, data: bytes) -> None:
        """Send telemetry when there is a connection; the oldest is dropped where too much waits.

        Raises:
            BusError: the link is closed.
            UnknownPeer: the broker does not admit our key.
        """
        with self._lock:
            self._check()
            self.dropped += len(self._telemetry) == self._telemetry.maxlen
            self._telemetry.append(data)
        self._wake.set()

    def check(self) -> None:
        """Raise an error if the link cannot be used.

        Raises:
            BusError: it is closed.
            UnknownPeer: the broker does not admit our key.
        """
        with self._lock:
            self._check()

    def _check(self) -> None:
        if self._stopping:
            raise BusError("The bus is closed; make a new one.")
        if self._denied:
            raise UnknownPeer(f"The bus at {self.address} does not admit our key; have the public key admitted there.")

    @property
    def up(self) -> bool:
        """Whether there is a connection."""
        return self._up

    def close(self, timeout_s: float = 0.5) -> None:
        """Send what waits, as long as that takes no longer than the time-out; then stop the thread."""
        deadline = time.monotonic() + timeout_s
        while (self._telemetry or self._notes) and self._up and time.monotonic() < deadline:
            time.sleep(0.005)
        with self._lock:
            self._stopping = True
        self._wake.set()
        self._thread.join()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._wake.handle, self._monitor):
            poller.register(source, zmq.POLLIN)
        next_beat = time.monotonic() + _BEAT_S
        while not self._stopping:
            poller.register(self._dealer, zmq.POLLIN | (zmq.POLLOUT if self._blocked else 0))
            poller.poll(math.ceil(max(0.0, next_beat - time.monotonic()) * 1_000))
            try:
                self._turn(beat=time.monotonic() >= next_beat)
            except Exception:
                _log.exception("The connection to %s goes on after an error.", self.address)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + _BEAT_S
        with self._lock:
            for request in self._requests.values():
                request.answered.set()
        self._dealer.disable_monitor()
        self._context.destroy(linger=0)
        self._wake.close()

    def _turn(self, beat: bool) -> None:
        self._wake.clear()
        self._watch()
        self._read()
        if beat:
            self._reconnect()
            self._beat(False)
        self._write()

    def _reconnect(self) -> None:
        """Connect anew after a refusal or a long silence: libzmq gives up for good after some failed handshakes."""
        self._beats_down += 1
        if self._up or not (self._denied or self._beats_down >= _PATIENCE_BEATS):
            return
        self._beats_down = 0
        with suppress(zmq.ZMQError):
            self._dealer.disconnect(self.address)
        self._dealer.connect(self.address)

    def _watch(self) -> None:
        """Hear of the connection: after a new one everything unanswered is sent again."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            self._up, self._beats_down = event == _CONNECTED, 0
            if event == _LOST:
                continue
            with self._lock:
                self._denied = event == _DENIED
                self._notes.clear()
                for request in self._requests.values():
                    request.due = 0.0
                    if self._denied:
                        request.answered.set()
            if event == _CONNECTED:
                self._beat(True)

    def _read(self) -> None:
        while True:
            try:
                frames = self._dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) < 4 or frames[0] != wire.VERSION:
                continue
            verb, subject = frames[1], frames[2]
            if verb == wire.LETTER and len(frames) == 5:
                self._hear(subject.decode(), frames[3], frames[4])
            elif verb == wire.UNKNOWN:
                self._lost(subject.decode())
            elif verb != wire.PROBE:
                self._finish(subject, verb, frames[3])

    def _finish(self, number: bytes, verb: bytes, body: bytes) -> None:
        """Give an answer to who waits for it."""
        with self._lock:
            request = self._requests.pop(number, None)
        if request is None:
            return
        request.reply = verb, body
        request.answered.set()
        if request.then is not None:
            request.then(_result(verb, body))

    def _write(self) -> None:
        """Send all that is due, in order of its making, until the socket takes no more."""
        now = time.monotonic()
        with self._lock:
            due = [request for request in self._requests.values() if request.due <= now]
        self._blocked = False
        for request in due:
            if not self._put([wire.VERSION, request.verb, request.number, request.body]):
                return
            request.due = now + _RESEND_S
        while self._notes:
            if not self._put(self._notes[0]):
                return
            self._notes.popleft()
        if self._up:
            self._write_telemetry()

    def _write_telemetry(self) -> None:
        while True:
            with self._lock:
                if not self._telemetry:
                    return
                if not self._put([wire.VERSION, wire.TELEMETRY, b"", self._telemetry[0]]):
                    return
                self._telemetry.popleft()

    def _put(self, frames: list[bytes]) -> bool:
        try:
            self._dealer.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self._blocked = True
            return False
        return True


def _result(verb: bytes, body: bytes) -> int | EsperError:
    """Read the body of an answer."""
    try:
        if verb == wire.DONE:
            return int(wire.unpack(body, offset=int)["offset"])
        if verb == wire.REFUSED:
            return wire.unpack_error(body)
    except EsperError as error:
        return error
    return BusError(f"The bus answered {verb[:20]!r}, which this release does not know; update it.")
