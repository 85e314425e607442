"""What a client and the broker say to each other, frame by frame.

```
client to broker    [version, verb, request id, body]
    PUBLISH     envelope                                  answered
    TELEMETRY   envelope                                  never answered; the request id is empty
    SUBSCRIBE   {name, topics, group, since, resume}      answered with the next offset
    PULL        {name, room, held}                        never answered; also the subscriber's sign of life
    ACK         {name, offsets}                           answered
    LEAVE       {name}                                    answered
    FORGET      {group}                                   answered
broker to client
    [version, DONE, request id, body]
    [version, BUSY, request id, text]                     a consumer is full: try again
    [version, REFUSED, request id, {kind, text}]
    [version, LETTER, name, {offset, priority}, envelope]
    [version, UNKNOWN, name, text]                        subscribe again
    [version, PROBE, name, nothing]                       is anybody there; to be passed over
```

Every request can be sent twice without harm, so a client sends it again until it is answered.
"""

import contextlib
import os
import threading
from typing import Any, final

import msgpack  # type: ignore[import-untyped]

from esper.leyline.codec import MAX_BYTES
from esper.leyline.errors import BusError, ContractError, EsperError, SchemaMismatch

VERSION = b"oona/1"
PUBLISH, TELEMETRY, SUBSCRIBE, PULL = b"publish", b"telemetry", b"subscribe", b"pull"
ACK, LEAVE, FORGET = b"ack", b"leave", b"forget"
DONE, BUSY, REFUSED, LETTER = b"done", b"busy", b"refused", b"letter"
UNKNOWN, PROBE = b"unknown", b"probe"

MAX_FRAME_BYTES = MAX_BYTES + 2**16
"""Longest frame that is read, in bytes; the connection that a longer one comes from is cut."""

WINDOW = 32
"""Letters that a subscriber holds ready at most."""

LARGE_BYTES = 2**20
"""A longer letter travels alone, in bytes: the next one comes when the subscriber asks again."""

_ERRORS: dict[str, type[EsperError]] = {kind.__name__: kind for kind in (BusError, ContractError, SchemaMismatch)}


def pack(**fields: Any) -> bytes:
    """Write the body of a request or an answer."""
    data: bytes = msgpack.packb(fields)
    return data


def unpack(data: bytes, **kinds: Any) -> dict[str, Any]:
    """Read what `pack` wrote.

    Args:
        data: the bytes.
        kinds: the type of each field, or a tuple of types; there are no other fields.

    Raises:
        ContractError: the bytes are not these fields.

    Example:
        >>> unpack(pack(name="a", room=3), name=str, room=int)
        {'name': 'a', 'room': 3}
    """
    try:
        fields = msgpack.unpackb(data)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ContractError(f"{len(data)} bytes are not a request: {error or type(error).__name__}.") from error
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        raise ContractError(f"The request does not have the fields {', '.join(kinds)}.")
    for name, kind in kinds.items():
        if not isinstance(fields[name], kind):
            raise ContractError(f"The request's field {name} is of type {type(fields[name]).__name__}, not {kind}.")
    return fields


def pack_error(error: EsperError) -> bytes:
    """Write an error for the other side."""
    kind = next((each.__name__ for each in type(error).__mro__ if each.__name__ in _ERRORS), BusError.__name__)
    return pack(kind=kind, text=str(error))


def unpack_error(data: bytes) -> EsperError:
    """Return the error that the other side wrote."""
    fields = unpack(data, kind=str, text=str)
    return _ERRORS.get(fields["kind"], BusError)(fields["text"])


@final
class Wake:
    """Wakes a poll from another thread: its file descriptor becomes readable. It may be set after it was closed."""

    def __init__(self) -> None:
        """Open a pipe."""
        self._lock, self._open = threading.Lock(), True
        self.handle, self._writer = os.pipe()
        os.set_blocking(self.handle, False)
        os.set_blocking(self._writer, False)

    def set(self) -> None:
        """Make the handle readable."""
        # Whoever closes it does so in a thread of its own; the number may be another file's by now.
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._open:
                os.write(self._writer, b"x")

    def clear(self) -> None:
        """Make the handle silent again."""
        try:
            while os.read(self.handle, 4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        """Close the pipe."""
        with self._lock:
            if self._open:
                os.close(self.handle)
                os.close(self._writer)
            self._open = False
