"""Messages to bytes and back: msgpack on the wire, JSON on request.

On the wire a message is the pair `[kind, fields]`, where `kind` is the name of its class; array buffers travel as
they are. In JSON it is one object whose first key, `type`, holds the kind, and buffers are base64.

Reading never raises anything but a `ContractError`: for bytes that are cut, too long or not a message, an unknown
kind or field, a value of the wrong type. `SchemaMismatch` is the one for another major version (see `Message`).
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar, overload

import msgpack  # type: ignore[import-untyped]
from pydantic import ValidationError

from esper.leyline import artifacts, commands, envelope, events, kernels, packets, reports
from esper.leyline.base import SCHEMA_MISMATCH, Message
from esper.leyline.errors import ContractError, SchemaMismatch

MAX_BYTES = 64 * 2**20
"""Longest message that is written or read, in bytes."""

Registry = Mapping[str, type[Message]]
"""Classes by kind."""

_M = TypeVar("_M", bound=Message)

_MESSAGES: tuple[type[Message], ...] = (
    commands.KasminaControlCommand,
    commands.AdaptationSignal,
    reports.HardwareContext,
    reports.HealthSignal,
    reports.FieldReport,
    packets.SystemStatePacket,
    kernels.KernelQuery,
    kernels.KernelQueryResult,
    kernels.Blueprint,
    kernels.CompiledKernelArtifact,
    kernels.CompilationRecord,
    kernels.UrabraskValidationReport,
    events.EpochEvent,
    events.SeedTransitioned,
    events.DecisionMade,
    events.GraftFaulted,
    events.RolledBack,
    events.BlueprintSubmitted,
    events.KernelReady,
    events.KernelCharacterized,
    events.KernelRejected,
    events.WorkerDied,
    events.SlowConsumer,
    events.SecurityAlert,
    artifacts.KernelSpec,
    artifacts.KernelManifest,
    artifacts.Attestation,
    artifacts.CompilationRequest,
    artifacts.CompiledKernel,
    artifacts.KernelFaulted,
    artifacts.BlueprintRequest,
    artifacts.BlueprintAnswer,
    envelope.Envelope,
)
REGISTRY: Registry = MappingProxyType({kind.__name__: kind for kind in _MESSAGES})
"""Every message of Leyline by kind."""


def encode(message: Message) -> bytes:
    """Return the message as msgpack bytes.

    Raises:
        ContractError: a value does not fit the wire (an integer over 64 bits), or the message exceeds `MAX_BYTES`.

    Example:
        >>> from esper.leyline.commands import AdaptationSignal
        >>> decode(AdaptationSignal, encode(AdaptationSignal(reason="spike"))).reason
        'spike'
    """
    kind = type(message).__name__
    try:
        data: bytes = msgpack.packb((kind, message.model_dump()))
    except (OverflowError, ValueError, TypeError) as error:
        raise ContractError(f"{kind} cannot be written: {error}.") from error
    _check_size(len(data))
    return data


@overload
def decode(kind: type[_M], data: bytes) -> _M: ...
@overload
def decode(kind: Registry, data: bytes) -> Message: ...
def decode(kind: type[Message] | Registry, data: bytes) -> Message:
    """Read a message that `encode` wrote.

    Args:
        kind: the class expected, or a registry such as `REGISTRY` when several may arrive.
        data: the bytes.

    Raises:
        ContractError: the bytes are not such a message.
        SchemaMismatch: they are one of another major version.
    """
    _check_size(len(data))
    try:
        parts = msgpack.unpackb(data)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ContractError(f"{len(data)} bytes are not a message: {error or type(error).__name__}.") from error
    match parts:
        case [str(name), dict(fields)]:
            cls = _class_of(kind, name)
        case _:
            raise ContractError("Bytes hold something else than a message; expected the pair [kind, fields].")
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        raise _refusal(cls, error) from error


def to_json(message: Message) -> str:
    """Return the message as one line of JSON; NaN and infinities are written as constants."""
    fields = message.model_dump_json()
    return f'{{"type":"{type(message).__name__}",{fields[1:]}'


@overload
def from_json(kind: type[_M], text: str | bytes) -> _M: ...
@overload
def from_json(kind: Registry, text: str | bytes) -> Message: ...
def from_json(kind: type[Message] | Registry, text: str | bytes) -> Message:
    """Read a message that `to_json` wrote; arguments and errors are those of `decode`."""
    _check_size(len(text))
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{len(text)} characters are not JSON: {error}.") from error
    if not isinstance(fields, dict) or not isinstance(name := fields.pop("type", None), str):
        raise ContractError('JSON holds something else than a message; expected an object with a "type".')
    cls = _class_of(kind, name)
    try:
        return cls.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise _refusal(cls, error) from error


def seal(message: Message, topic: str, sender: str, **fields: Any) -> envelope.Envelope:
    """Put a message into an envelope; `fields` are further fields of `Envelope`, e.g. `priority`."""
    kind = type(message).__name__
    return envelope.Envelope(topic=topic, sender=sender, kind=kind, payload=encode(message), **fields)


def unseal(letter: envelope.Envelope, registry: Registry = REGISTRY) -> Message:
    """Take the message out of an envelope.

    Raises:
        ContractError: the payload is not a message of the kind that the envelope names.
    """
    return decode(_class_of(registry, letter.kind), letter.payload)


def _check_size(size: int) -> None:
    """Raise `ContractError` above `MAX_BYTES`."""
    if size > MAX_BYTES:
        raise ContractError(f"A message of {size} bytes is too long; at most {MAX_BYTES} are allowed.")


def _class_of(kind: type[Message] | Registry, name: str) -> type[Message]:
    """Return the class named on the wire, if it is one of those expected."""
    expected = {kind.__name__: kind} if isinstance(kind, type) else kind
    if name not in expected:
        raise ContractError(f"Message kind {name[:80]!r} is not expected here; allowed: {', '.join(expected)}.")
    return expected[name]


def _refusal(cls: type[Message], error: ValidationError) -> ContractError:
    """Turn pydantic's list of problems into one error of ours."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    for problem in problems:
        if problem["type"] == SCHEMA_MISMATCH:
            return SchemaMismatch(f"{problem['msg']}.")
    first = "; ".join(f"{'.'.join(map(str, entry['loc'])) or 'message'}: {entry['msg']}" for entry in problems[:3])
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ContractError(f"{cls.__name__} breaks its contract: {first}{more}.")
