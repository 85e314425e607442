"""A run's files over TCP: one question, one answer; the server keeps nothing of its clients and only ever reads.

```
client to server    {verb: "look"}                          or  {verb: "read", file, offset, size}
server to client    {clock, files: {name: [size, stamp]}}   or  {data}   or  {refused}
```
"""

import threading
import time
from pathlib import Path
from typing import Any, Final, final

import zmq

from esper.leyline.errors import BusError, ConfigError, ContractError
from esper.nissa.watch.source import PIECE, Folder, Listing, Mark, Source
from esper.oona.gate import Gate, check_address, is_local
from esper.oona.keys import CurveKeys
from esper.oona.wire import pack, unpack

TIMEOUT_S: Final = 2.0
"""Time after which a question counts as lost, in seconds."""

_QUESTION_BYTES = 4096
_ANSWER_BYTES = PIECE + 4096
_POLL_MS = 200


def endpoint(place: str) -> str:
    """Return the address of `HOST:PORT`.

    Raises:
        ConfigError: it is not of that form.

    Example:
        >>> endpoint("127.0.0.1:7070"), endpoint("tcp://localhost:7070")
        ('tcp://127.0.0.1:7070', 'tcp://127.0.0.1:7070')
    """
    host, colon, port = place.removeprefix("tcp://").rpartition(":")
    if not (host and colon and (port == "*" or port.isdigit() and 0 < int(port) < 2**16)):
        raise ConfigError(f"{place!r} is no address; write HOST:PORT, e.g. 127.0.0.1:7070.")
    # Sockets are bound to numbers.
    return f"tcp://{'127.0.0.1' if host == 'localhost' else host}:{port}"


@final
class Server:
    """Lets others watch a run: answers questions about its few files, and about nothing else.

    Args:
        folder: the run's.
        place: `HOST:PORT` to listen on; port `*` takes a free one.
        keys: our pair with the folder of admitted keys; None for this machine only.

    Raises:
        ConfigError: other machines can reach the address and there are no keys, or there is no such folder.
        BusError: the address cannot be listened on.
    """

    def __init__(self, folder: str | Path, place: str, keys: CurveKeys | None = None) -> None:
        """Listen."""
        address = endpoint(place)
        check_address(address, keys)
        self._folder = Folder(folder)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.linger, self._socket.sndtimeo = 0, 0
        self._socket.ipv6, self._socket.maxmsgsize = "[" in address, _QUESTION_BYTES
        self._gate = Gate(self._context, self._socket, keys) if keys is not None else None
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise BusError(f"{address} cannot be listened on: {error}; give an address of this machine.") from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def run(self, stop: threading.Event | None = None) -> None:
        """Answer until told to stop, for ever without an event; then close."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        if self._gate is not None:
            poller.register(self._gate.socket, zmq.POLLIN)
        try:
            while stop is None or not stop.is_set():
                ready = dict(poller.poll(_POLL_MS))
                if self._gate is not None and self._gate.socket in ready:
                    self._gate.answer()
                if self._socket in ready:
                    self._serve()
        finally:
            self.close()

    def _serve(self) -> None:
        question = self._socket.recv_multipart(zmq.NOBLOCK)
        try:
            answer = self._answer(b"".join(question))
        except ContractError as error:
            answer = pack(refused=str(error))
        self._socket.send(answer, zmq.NOBLOCK)

    def _answer(self, question: bytes) -> bytes:
        if question == pack(verb="look"):
            clock, files = self._folder.look()
            return pack(clock=clock, files={name: list(mark) for name, mark in files.items()})
        asked = unpack(question, verb=str, file=str, offset=int, size=int)
        return pack(piece=self._folder.read(asked["file"], asked["offset"], asked["size"]))

    def close(self) -> None:
        """Stop listening; may be called twice."""
        self._context.destroy(linger=0)


@final
class Remote(Source):
    """A run that somebody serves.

    Args:
        place: `HOST:PORT` of the server.
        keys: our pair with the server's public key; None for a server on this machine.
        timeout_s: longest wait for an answer, in seconds.

    Raises:
        ConfigError: the server is on another machine and there are no keys.
    """

    def __init__(self, place: str, keys: CurveKeys | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        """Ask nothing yet."""
        self.name = endpoint(place)
        if keys is None and not is_local(self.name):
            raise ConfigError(
                f"{self.name} is another machine: give --key and --server_key, as `esper keys` has told them, "
                "or forward a port of this machine."
            )
        self._keys, self._timeout_s = keys, timeout_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None

    def look(self) -> Listing:
        """Return what the server has."""
        found = self._ask({"verb": "look"}, clock=float, files=dict)
        try:
            return Listing(found["clock"], {str(name): Mark(*map(int, mark)) for name, mark in found["files"].items()})
        except (TypeError, ValueError) as error:
            raise self._stranger() from error

    def read(self, file: str, offset: int, size: int) -> bytes:
        """Return bytes of a file."""
        asked = {"verb": "read", "file": file, "offset": offset, "size": size}
        return bytes(self._ask(asked, piece=bytes)["piece"])

    def _ask(self, question: dict[str, Any], **kinds: Any) -> dict[str, Any]:
        try:
            return unpack(self._exchange(pack(**question)), **kinds)
        except ContractError as error:
            raise self._stranger() from error

    def _exchange(self, question: bytes) -> bytes:
        """Send and receive; a socket that got no answer is given up, and the next question takes a fresh one."""
        socket = self._socket = self._socket or self._connected()
        deadline = time.monotonic() + self._timeout_s
        try:
            socket.send(question, zmq.NOBLOCK)
            while (left := deadline - time.monotonic()) > 0:
                if socket.poll(max(1, int(1000 * left))):
                    return b"".join(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.ZMQError as error:
            self._hang_up()
            raise BusError(f"{self.name}: {error}; trying again.") from error
        except BaseException:
            self._hang_up()
            raise
        self._hang_up()
        hint = "" if self._keys is None else ", with our key admitted"
        raise BusError(f"{self.name} gives no answer; trying again. Does `esper watch RUN --serve` run there{hint}?")

    def _connected(self) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.REQ)
        socket.linger, socket.maxmsgsize = 0, _ANSWER_BYTES
        socket.ipv6 = "[" in self.name
        if self._keys is not None:
            socket.curve_publickey, socket.curve_secretkey = self._keys.public.encode(), self._keys.secret.encode()
            socket.curve_serverkey = self._keys.server.encode()
        socket.connect(self.name)
        return socket

    def _stranger(self) -> BusError:
        return BusError(f"{self.name} does not answer as a served run does; is it `esper watch RUN --serve`?")

    def _hang_up(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close(linger=0)

    def close(self) -> None:
        """Hang up."""
        self._hang_up()
        self._context.destroy(linger=0)
