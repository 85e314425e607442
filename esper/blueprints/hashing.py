"""Canonical JSON and the content hash that names blueprints."""

import hashlib
import json


def canonical_json(value: object) -> bytes:
    """Return the one JSON text of `value`: sorted keys, no blanks, ASCII only.

    Raises:
        ValueError: a number is not finite.
        TypeError: something is not plain data.

    Example:
        >>> canonical_json({"b": 1, "a": [True, 0.5]})
        b'{"a":[true,0.5],"b":1}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def content_hash(value: object) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
