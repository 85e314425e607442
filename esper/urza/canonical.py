"""The one JSON text of a message: what is hashed and signed."""

import hashlib
import json
from typing import TypeVar

from esper.leyline.base import Message
from esper.leyline.codec import MAX_BYTES, from_json
from esper.leyline.errors import ContractError

_M = TypeVar("_M", bound=Message)


def canonical_text(value: object) -> bytes:
    """Return the one JSON text of plain data: sorted keys, no blanks, ASCII only.

    Raises:
        ContractError: the value is not plain data, or a number is not finite.

    Example:
        >>> canonical_text({"b": 1, "a": True})
        b'{"a":true,"b":1}'
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ContractError(
            f"A {type(value).__name__} has no canonical JSON: {error}; use finite plain data."
        ) from error
    return text.encode("ascii")


def canonical(message: Message) -> bytes:
    """Return the canonical JSON of a message; its kind is in it, so that none can be shown as another.

    Raises:
        ContractError: a number is not finite.

    Example:
        >>> from esper.leyline.commands import AdaptationSignal
        >>> canonical(AdaptationSignal(reason="spike"))[-26:]
        b'"type":"AdaptationSignal"}'
    """
    return canonical_text({"type": type(message).__name__, **message.model_dump(mode="json")})


def parse(kind: type[_M], text: str | bytes) -> _M:
    """Read JSON of a message of one kind, with or without its `type`.

    Raises:
        ContractError: the text is not such a message.

    Example:
        >>> from esper.leyline.commands import AdaptationSignal
        >>> parse(AdaptationSignal, '{"reason": "spike"}').reason
        'spike'
    """
    if len(text) > MAX_BYTES:
        raise ContractError(f"{len(text)} characters are too long for a {kind.__name__}; at most {MAX_BYTES}.")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{len(text)} characters are not JSON: {error}.") from error
    if isinstance(fields, dict) and "type" not in fields:
        text = json.dumps({"type": kind.__name__, **fields})
    return from_json(kind, text)


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes, as 64 hexadecimal digits.

    Example:
        >>> sha256(b"")[:8]
        'e3b0c442'
    """
    return hashlib.sha256(data).hexdigest()
