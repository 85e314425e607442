"""What a worker and its pool say to each other: `[version, verb, body]`, the body in msgpack.

```
worker to pool   HELLO   {name, token, job}          job: what it does at the moment, or empty
                 BEAT    {job}                       every `beat_s`
                 DONE    {job, result, cpu}          said again until it is heard
                 FAILED  {job, reason, final, cpu}   said again until it is heard
                 UNFIT   {job, reason}               the job is for another machine; said again until it is heard
pool to worker   WELCOME {beat_s, patience_s}
                 HEARD   {job}                       answers a beat (job empty), a DONE, a FAILED or an UNFIT
                 JOB     {id, key, kind, payload, attempt}
                 WHO     {}                          say hello first
                 STOP    {}
```
"""

from collections.abc import Sequence
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]

from esper.leyline.errors import ContractError
from esper.workers.journal import MAX_PAYLOAD

VERSION: Final = b"workers/2"
HELLO, BEAT, DONE, FAILED, UNFIT = b"hello", b"beat", b"done", b"failed", b"unfit"
WELCOME, HEARD, JOB, WHO, STOP = b"welcome", b"heard", b"job", b"who", b"stop"

MAX_FRAME: Final = MAX_PAYLOAD + 2**16
"""Longest frame that is read, in bytes; the connection that a longer one comes from is cut."""

_MAX_TEXT: Final = 20_000
_NUMBER = (int, float)
_FIELDS: Final[dict[bytes, dict[str, Any]]] = {
    HELLO: {"name": str, "token": str, "job": str},
    BEAT: {"job": str},
    DONE: {"job": str, "result": bytes, "cpu": _NUMBER},
    FAILED: {"job": str, "reason": str, "final": bool, "cpu": _NUMBER},
    UNFIT: {"job": str, "reason": str},
    WELCOME: {"beat_s": _NUMBER, "patience_s": _NUMBER},
    HEARD: {"job": str},
    JOB: {"id": str, "key": str, "kind": str, "payload": bytes, "attempt": int},
    WHO: {},
    STOP: {},
}


def pack(verb: bytes, **fields: Any) -> list[bytes]:
    """Return the frames of a message."""
    return [VERSION, verb, msgpack.packb(fields)]


def unpack(frames: Sequence[bytes]) -> tuple[bytes, dict[str, Any]]:
    """Return verb and fields of a message.

    Raises:
        ContractError: the frames are not such a message.

    Example:
        >>> unpack(pack(BEAT, job="a"))
        (b'beat', {'job': 'a'})
    """
    if len(frames) != 3 or frames[0] != VERSION:
        raise ContractError(f"{len(frames)} frames are not a message of {VERSION.decode()}.")
    expected = _FIELDS.get(frames[1])
    if expected is None:
        raise ContractError(f"{frames[1][:40]!r} is not a message of {VERSION.decode()}.")
    try:
        fields = msgpack.unpackb(frames[2])
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ContractError(f"The body of {frames[1]!r} cannot be read: {error}.") from error
    if not isinstance(fields, dict) or fields.keys() != expected.keys():
        raise ContractError(f"The body of {frames[1]!r} must have the fields {list(expected)}.")
    for name, kind in expected.items():
        _check(name, fields[name], kind)
    return frames[1], fields


def _check(name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ContractError(f"Field {name} is of type {type(value).__name__}, which it may not be.")
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        raise ContractError(f"Field {name} has {len(value)} characters; at most {_MAX_TEXT} are allowed.")
    if name == "cpu" and not 0 <= value < 1e9:
        raise ContractError(f"Field cpu is {value}; it is a number of seconds.")
