"""Bytes and back: every message, every byte pinned, and nothing but our errors for anything else.

The golden files under `golden/` hold the bytes of one example per message (see `conftest.py`). A change of them is a
change of the wire format: raise the schema version, then write them anew with

    LEYLINE_GOLDEN=write python -m pytest tests/leyline/test_codec.py -k golden
"""

import json
import math
import os
import re
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from esper import leyline as ll
from esper.leyline import codec
from esper.leyline.base import Message, Record

GOLDEN = Path(__file__).parent / "golden"
KINDS = sorted(ll.REGISTRY)
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def values(annotation: Any, bounds: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for values of one field's type, inside the field's bounds."""
    args = get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return records(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return st.sampled_from(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return st.one_of(st.none(), *(values(arg, bounds) for arg in args if arg is not NoneType))
    if get_origin(annotation) is Literal:
        return st.sampled_from(args)
    if get_origin(annotation) is tuple:
        return st.lists(values(args[0], {}), max_size=3).map(tuple)
    if get_origin(annotation) is dict:
        return st.dictionaries(values(args[0], {}), values(args[1], {}), max_size=3)
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le")
    plain = {
        bool: st.booleans(),
        bytes: st.binary(max_size=9),
        str: st.text(max_size=9),
        int: st.integers(-(2**63) if low is None else low, 2**63 - 1 if high is None else high),
        float: st.floats(low, high, allow_nan=False, exclude_min="gt" in bounds),
    }
    return plain[annotation]


def fields_of(cls: type[Record], skip: set[str]) -> dict[str, st.SearchStrategy[Any]]:
    """Return a strategy per field of `cls`."""
    found = {}
    for name, field in cls.model_fields.items():
        bounds = {
            key: getattr(rule, key) for rule in field.metadata for key in ("ge", "gt", "le") if hasattr(rule, key)
        }
        if name not in {*skip, "schema_version"}:
            found[name] = values(field.annotation, bounds)
    return found


@st.composite
def packets(draw: st.DrawFn) -> ll.SystemStatePacket:
    """Draw a packet whose parts belong together."""
    ids = draw(st.lists(st.text(max_size=5), unique=True, max_size=4))
    rows, layers = len(ids), draw(st.lists(st.text(max_size=5), max_size=2))
    column = st.lists(st.floats(width=32, allow_nan=False), min_size=rows, max_size=rows)
    nodes = rows + len(layers)
    node = st.integers(0, max(nodes - 1, 0))
    edge = st.tuples(node, node, st.sampled_from(ll.EdgeKind))
    state = draw(st.lists(st.integers(0, 11), min_size=rows, max_size=rows))
    paths = draw(st.lists(st.text(max_size=5), max_size=2))
    share = st.floats(0, 1)
    tables = {
        "site_paths": paths,
        "site_health": ll.HealthMap.of(**{name: np.zeros(len(paths)) for name in draw(st.lists(st.text(max_size=5)))}),
        "memory_pressure": draw(st.dictionaries(st.text(max_size=5), share, max_size=2)),
        "seed_states": ll.SeedTable.of(ids, state=state, alpha=draw(column)),
        "health_map": ll.HealthMap.of(**draw(st.dictionaries(st.text(max_size=5), column, max_size=2))),
        "edges": ll.Edges.of(layers, draw(st.lists(edge, max_size=3 if nodes else 0))),
        "evidence": {seed: draw(records(ll.Counterfactual)) for seed in ids[:1]},
    }
    return ll.SystemStatePacket(**tables, **draw(st.fixed_dictionaries(fields_of(ll.SystemStatePacket, set(tables)))))


MOVES = [(source, command) for source, commands in ll.TRANSITIONS.items() for command in sorted(commands)]


def records(cls: type[Record]) -> st.SearchStrategy[Any]:
    """Return a strategy for valid records of a class; those with rules between fields are listed."""
    if cls is ll.SystemStatePacket:
        return packets()
    if cls is ll.Counterfactual:
        three = st.lists(st.floats(allow_nan=False), min_size=3, max_size=3).map(sorted)
        return st.builds(lambda x, n: cls(lower=x[0], mean=x[1], upper=x[2], n=n), three, st.integers(0, 2**40))
    if cls is ll.SeedTransitioned:
        free = fields_of(cls, {"source", "target", "command"})
        return st.fixed_dictionaries({**free, "move": st.sampled_from(MOVES)}).map(_moved)
    special: dict[str, st.SearchStrategy[Any]] = {
        "outcome": st.sampled_from(sorted(ll.FINAL)),
        "topic": st.sampled_from([ll.TELEMETRY_SEED_HEALTH, ll.event_topic("EpochEvent"), "a"]),
    }
    special = {name: strategy for name, strategy in special.items() if name in cls.model_fields}
    return st.builds(cls, **{**fields_of(cls, set(special)), **special})


def _moved(fields: dict[str, Any]) -> ll.SeedTransitioned:
    source, command = fields.pop("move")
    return ll.SeedTransitioned(**fields, source=source, command=command, target=ll.TARGET[command])


def concrete(cls: type[Message]) -> set[type[Message]]:
    """Return the message classes that nothing of Leyline inherits from."""
    below = [sub for sub in cls.__subclasses__() if sub.__module__.startswith("esper.leyline")]
    return {cls} if not below else set().union(*map(concrete, below))


def tampered(message: Message, **fields: Any) -> bytes:
    """Return the message's bytes with fields added or changed."""
    return msgpack.packb((type(message).__name__, {**message.model_dump(), **fields}))


def test_every_message_is_registered_and_has_an_example() -> None:
    """The registry, the classes and the golden files are the same list."""
    assert {cls.__name__ for cls in concrete(Message)} == set(KINDS)
    assert sorted(path.stem for path in GOLDEN.glob("*")) == KINDS


def test_golden_bytes(example: Message) -> None:
    """The wire format has not moved, and old bytes still read."""
    path = GOLDEN / f"{type(example).__name__}.msgpack"
    if os.environ.get("LEYLINE_GOLDEN") == "write":
        path.write_bytes(ll.encode(example))
    assert ll.encode(example) == path.read_bytes()
    assert ll.decode(ll.REGISTRY, path.read_bytes()) == example


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str) -> None:
    """Any valid message comes back equal, from bytes and from JSON, by class and by registry."""
    cls = ll.REGISTRY[kind]

    @QUICK
    @given(records(cls))
    def check(message: Message) -> None:
        data, text = ll.encode(message), ll.to_json(message)
        assert ll.decode(cls, data) == ll.decode(ll.REGISTRY, data) == message
        assert ll.from_json(cls, text) == ll.from_json(ll.REGISTRY, text) == message
        assert ll.encode(ll.decode(cls, data)) == data

    check()


def test_buffers_travel_raw(packet: ll.SystemStatePacket) -> None:
    """Arrays are bytes on the wire, and base64 only in JSON."""
    alpha = packet.seed_states.alpha
    assert alpha.data in ll.encode(packet)
    assert isinstance(json.loads(ll.to_json(packet))["seed_states"]["alpha"]["data"], str)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_travel(value: float) -> None:
    """A broken loss must be reportable, in both forms."""
    event = ll.EpochEvent(run_id="r", epoch=0, step=0, train_loss=value)
    for back in (ll.decode(ll.EpochEvent, ll.encode(event)), ll.from_json(ll.EpochEvent, ll.to_json(event))):
        assert back.train_loss == value or (back.train_loss != back.train_loss and value != value)


def test_json_is_one_line_that_names_its_type(example: Message) -> None:
    """A journal line says what it is; no field may hide the type."""
    text = ll.to_json(example)
    assert "\n" not in text
    assert next(iter(json.loads(text).items())) == ("type", type(example).__name__)
    assert "type" not in type(example).model_fields


def test_messages_are_frozen_and_strict(example: Message) -> None:
    """Nothing can be changed or added, and the version is the class's own."""
    assert example.schema_version == type(example).SCHEMA
    with pytest.raises(ValidationError, match="frozen"):
        example.schema_version = "1.1"
    with pytest.raises(ValidationError, match="Extra inputs"):
        type(example)(**dict(example), surprise=1)


def test_older_minor_versions_read(example: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before the last minor version still reads."""
    monkeypatch.setattr(type(example), "SCHEMA", "1.7")
    assert ll.decode(ll.REGISTRY, tampered(example, schema_version="1.2")).schema_version == "1.2"


def test_bytes_of_earlier_releases_read() -> None:
    """What was added since has its default, and nothing else differs."""
    for path in (GOLDEN.parent / "older").iterdir():
        kind, version = path.stem.split("-")
        message = ll.decode(ll.REGISTRY, path.read_bytes())
        assert (type(message).__name__, message.schema_version) == (kind, version)
        _, fields = msgpack.unpackb(path.read_bytes())
        assert msgpack.unpackb(msgpack.packb(message.model_dump(include=fields.keys()))) == fields
        for name, field in type(message).model_fields.items():
            assert name in fields or getattr(message, name) == field.get_default(call_default_factory=True)


def test_newer_minor_versions_read_without_unknown_fields(example: Message) -> None:
    """A newer minor version reads if it is understood; what is not understood is refused, never dropped."""
    assert ll.decode(ll.REGISTRY, tampered(example, schema_version="1.9")).schema_version == "1.9"
    with pytest.raises(ll.ContractError, match="surprise"):
        ll.decode(ll.REGISTRY, tampered(example, schema_version="1.9", surprise=1))


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0"])
def test_other_major_versions_are_refused(example: Message, version: str) -> None:
    """Another major version is a `SchemaMismatch`, whatever else it holds."""
    known = type(example).SCHEMA
    with pytest.raises(ll.SchemaMismatch, match=f"has schema version {version}; this release reads {known}"):
        ll.decode(ll.REGISTRY, tampered(example, schema_version=version, surprise=1))
    with pytest.raises(ll.SchemaMismatch):
        text = re.sub(r'"schema_version":"1\.\d"', f'"schema_version":"{version}"', ll.to_json(example))
        ll.from_json(type(example), text)


def test_a_part_of_another_major_version_is_refused(packet: ll.SystemStatePacket) -> None:
    """Messages inside messages are gated too."""
    hardware = {**packet.hardware_context.model_dump(), "schema_version": "2.0"}
    with pytest.raises(ll.SchemaMismatch, match="HardwareContext has schema version 2.0"):
        ll.decode(ll.SystemStatePacket, tampered(packet, hardware_context=hardware))


@pytest.mark.parametrize(
    "version", ["", "1", "1.", ".1", "1.0.0", "one.0", "-1.0", "01.0", "1.٣", "1" * 5000 + ".0", 1.0]
)
def test_versions_that_are_none_are_refused(version: object) -> None:
    """A version has the form `major.minor`."""
    with pytest.raises(ll.ContractError) as caught:
        ll.decode(ll.AdaptationSignal, tampered(ll.AdaptationSignal(), schema_version=version))
    assert not isinstance(caught.value, ll.SchemaMismatch)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes are not a message"),
        (b"\xc1", "not a message"),
        (b"\xc0", "expected the pair"),
        (msgpack.packb(["AdaptationSignal", {}, 1]), "expected the pair"),
        (msgpack.packb([1, {}]), "expected the pair"),
        (msgpack.packb(["Nonsense", {}]), "'Nonsense' is not expected here; allowed: AdaptationSignal"),
        (msgpack.packb(["EpochEvent", {}]), "'EpochEvent' is not expected here"),
        (msgpack.packb(["AdaptationSignal", {"reason": 1}]), "AdaptationSignal breaks its contract: reason"),
        (msgpack.packb(["AdaptationSignal", {b"\xff": 1}]), "AdaptationSignal breaks its contract"),
        (msgpack.packb(["AdaptationSignal", {"a": 1, "b": 1, "c": 1, "d": 1}]), "and 1 more"),
        (b"\x91" * 100_000, "not a message"),
        (b"\x92\xa1A\x81\xc0\xc0", "not a message"),
        (b"\xdd\xff\xff\xff\xff", "not a message"),
    ],
)
def test_malformed_bytes_are_named(data: bytes, words: str) -> None:
    """Each way of being no message has its own words."""
    with pytest.raises(ll.ContractError, match=words):
        ll.decode(ll.AdaptationSignal, data)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"type":1}', '{"type":"No"}', "[" * 100_000, b"\xff", "1" * 5000]
)
def test_malformed_json_is_refused(text: str | bytes) -> None:
    """The same for JSON."""
    with pytest.raises(ll.ContractError):
        ll.from_json(ll.REGISTRY, text)


def test_json_refuses_what_bytes_refuse() -> None:
    """Wrong types and unknown fields are contract errors in JSON too."""
    for fields in ('"reason":1', '"surprise":1'):
        with pytest.raises(ll.ContractError, match="breaks its contract"):
            ll.from_json(ll.AdaptationSignal, f'{{"type":"AdaptationSignal",{fields}}}')


def test_oversize_is_refused_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit holds for writing, for reading and for JSON."""
    signal = ll.AdaptationSignal(reason="x" * 200)
    data, text = ll.encode(signal), ll.to_json(signal)
    monkeypatch.setattr(codec, "MAX_BYTES", 100)
    for call in (
        lambda: ll.encode(signal),
        lambda: ll.decode(ll.REGISTRY, data),
        lambda: ll.from_json(ll.REGISTRY, text),
    ):
        with pytest.raises(ll.ContractError, match="at most 100 are allowed"):
            call()


def test_values_that_do_not_fit_the_wire_are_refused() -> None:
    """An integer over 64 bits cannot be written."""
    with pytest.raises(ll.ContractError, match="EpochEvent cannot be written"):
        ll.encode(ll.EpochEvent(run_id="r", epoch=2**64, step=0))


def test_every_truncation_is_refused(example: Message) -> None:
    """A message that was cut anywhere is no message."""
    data = ll.encode(example)
    for end in range(0, len(data), max(1, len(data) // 64)):
        with pytest.raises(ll.ContractError):
            ll.decode(ll.REGISTRY, data[:end])


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=80))
def test_arbitrary_bytes_raise_only_our_error(data: bytes) -> None:
    """No bytes can raise anything else."""
    with pytest.raises(ll.EsperError):
        ll.decode(ll.REGISTRY, data)


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.binary(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_wrong_values_raise_only_our_error(data: st.DataObject) -> None:
    """A real message with one field turned to junk is read, or refused by our error."""
    cls = ll.REGISTRY[data.draw(st.sampled_from(KINDS))]
    name, fields = msgpack.unpackb((GOLDEN / f"{cls.__name__}.msgpack").read_bytes())
    fields[data.draw(st.sampled_from(sorted(cls.model_fields)))] = data.draw(junk)
    read_or_refused(msgpack.packb([name, fields]))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0), st.binary(min_size=1, max_size=3))
def test_damaged_messages_raise_only_our_error(kind: str, position: int, patch: bytes) -> None:
    """A real message with a few bytes overwritten is read, or refused by our error."""
    data = bytearray((GOLDEN / f"{kind}.msgpack").read_bytes())
    start = position % len(data)
    data[start : start + len(patch)] = patch
    read_or_refused(bytes(data))


def read_or_refused(data: bytes) -> None:
    """Decode; what is read must be writable and usable, what is not must be a `ContractError`."""
    try:
        message = ll.decode(ll.REGISTRY, data)
    except ll.ContractError:
        return
    ll.encode(message)
    if isinstance(message, ll.SystemStatePacket):
        assert len(list(message.rows())) == len(message.seed_states)
        assert len(list(message.named_edges())) == len(message.edges)


def test_envelopes_carry_messages(example: Message) -> None:
    """What is sealed is unsealed, also after its own journey."""
    letter = ll.seal(example, ll.SYSTEM_EVENTS, "test", priority=ll.Priority.HIGH)
    assert ll.unseal(ll.decode(ll.Envelope, ll.encode(letter))) == example
    with pytest.raises(ll.ContractError, match="'Other' is not expected"):
        ll.unseal(letter.model_copy(update={"kind": "Other"}))


def test_an_envelope_that_lies_about_its_kind_is_refused() -> None:
    """The label and the message inside must agree."""
    letter = ll.seal(ll.AdaptationSignal(), ll.SYSTEM_EVENTS, "test")
    with pytest.raises(ll.ContractError, match="'AdaptationSignal' is not expected here; allowed: EpochEvent"):
        ll.unseal(letter.model_copy(update={"kind": "EpochEvent"}))


@pytest.mark.parametrize("topic", ["", "Upper", "a..b", ".a", "a.", "a b", "a.*", "a\n"])
def test_topics_are_dotted_lower_case(topic: str) -> None:
    """A topic is a plain address, never a pattern."""
    with pytest.raises(ValidationError):
        ll.Envelope(topic=topic, sender="s", kind="k")


def test_emergencies_come_first() -> None:
    """Sorting by priority puts the urgent ones in front."""
    assert sorted(ll.Priority)[0] is ll.Priority.EMERGENCY
